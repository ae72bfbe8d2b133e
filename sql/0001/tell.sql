-- How those that wait are told of a message.

-- Notifies the clients that listen, if the caller's transaction commits. A notification is a hint, and never worth a failure:
-- PostgreSQL undoes every transaction that notifies once its queue is full, which takes one session that listens and leaves
-- a transaction open. So nobody is told when it is nearly full, or when the setting pushpop_pg.notify is off; those that
-- wait look for themselves within a poll interval. A single expression, which is inlined where it is called.
--
-- A database without an encoding could send bytes that are no text, which breaks the connections of clients that listen for
-- UTF-8: there a topic is named only if it is ASCII.
create function pushpop.tell(topic text) returns void
language sql
as $body$
  select case
    when coalesce(pg_catalog.current_setting('pushpop_pg.notify', true), '') <> 'off'
      and pg_catalog.pg_notification_queue_usage() < 0.9
    then pg_catalog.pg_notify('pushpop',
      case when pg_catalog.getdatabaseencoding() = 'SQL_ASCII' and topic ~ '[^ -~]' then '' else topic end)
  end
$body$;
