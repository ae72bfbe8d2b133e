-- Functions are executable by everyone unless they are not.
revoke all on schema pushpop from public;
revoke all on all tables in schema pushpop from public;
revoke all on all functions in schema pushpop from public;
