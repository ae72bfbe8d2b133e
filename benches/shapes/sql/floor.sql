-- No queue: what PostgreSQL takes for an insert, a select and a delete by primary key alone.
-- The statements stand in src/queue.rs.

create table messages (
  id      uuid not null primary key,
  payload bytea not null
);
