-- Payloads as text, for other languages: what a client sends without naming its type is text, and arrives as it was sent.
--
-- push and push_many have a form for each type of payload: bytea, text and jsonb. PostgreSQL reads a string of unknown type as
-- text where a function has such a form. Without it such a string would be read in the notation of bytea, in which a backslash begins an escape.
-- Other functions have one form each: two that differ in another type than this would leave it to chance which one is called.

create function pushpop.push(
  topic        text,
  payload      text,
  id           uuid             default null,
  delay        double precision default null,
  ready_at     timestamptz      default null,
  headers      jsonb            default null,
  max_attempts integer          default null,
  sender       uuid             default null,
  fallback     integer          default 25,
  out pushed    uuid,
  out duplicate boolean
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $body$
begin
  select p.pushed, p.duplicate into pushed, duplicate
  from pushpop.push(push.topic, convert_to(push.payload, 'UTF8'), push.id, push.delay, push.ready_at, push.headers,
                    push.max_attempts, push.sender, push.fallback) p;
end
$body$;

create function pushpop.push(
  topic        text,
  payload      jsonb,
  id           uuid             default null,
  delay        double precision default null,
  ready_at     timestamptz      default null,
  headers      jsonb            default null,
  max_attempts integer          default null,
  sender       uuid             default null,
  fallback     integer          default 25,
  out pushed    uuid,
  out duplicate boolean
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $body$
begin
  select p.pushed, p.duplicate into pushed, duplicate
  from pushpop.push(push.topic, convert_to(push.payload::text, 'UTF8'), push.id, push.delay, push.ready_at, push.headers,
                    push.max_attempts, push.sender, push.fallback) p;
end
$body$;

-- An array of unknown type is refused, because nobody can tell of what it is one.
create function pushpop.push_many(
  topic        text,
  ids          uuid[],
  payloads     text[],
  delays       double precision[] default null,
  ready_ats    timestamptz[]      default null,
  headers      jsonb[]            default null,
  max_attempts integer[]          default null,
  sender       uuid               default null,
  fallback     integer            default 25
) returns setof integer
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $body$
begin
  return query
    select pushpop.push_many(
      push_many.topic, push_many.ids,
      (select array_agg(convert_to(u.payload, 'UTF8') order by u.place)
       from unnest(push_many.payloads) with ordinality u(payload, place)),
      push_many.delays, push_many.ready_ats, push_many.headers, push_many.max_attempts, push_many.sender,
      push_many.fallback);
end
$body$;

create function pushpop.push_many(
  topic        text,
  ids          uuid[],
  payloads     jsonb[],
  delays       double precision[] default null,
  ready_ats    timestamptz[]      default null,
  headers      jsonb[]            default null,
  max_attempts integer[]          default null,
  sender       uuid               default null,
  fallback     integer            default 25
) returns setof integer
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $body$
begin
  return query
    select pushpop.push_many(
      push_many.topic, push_many.ids, push_many.payloads::text[], push_many.delays, push_many.ready_ats, push_many.headers,
      push_many.max_attempts, push_many.sender, push_many.fallback);
end
$body$;

-- A payload as text; null if it is none. An error would undo the pop, and the next one would meet the same message.
create function pushpop.as_text(payload bytea) returns text
language plpgsql immutable strict
set search_path = pg_catalog, pg_temp
as $body$
begin
  return convert_from(as_text.payload, 'UTF8');
exception when character_not_in_repertoire or untranslatable_character then
  return null;
end
$body$;

-- A payload as JSON; null if it is none, or one that PostgreSQL cannot hold, for whatever reason: too deep, a number too large.
create function pushpop.as_json(payload bytea) returns jsonb
language plpgsql immutable strict
set search_path = pg_catalog, pg_temp
as $body$
begin
  return convert_from(as_json.payload, 'UTF8')::jsonb;
exception when others then
  return null;
end
$body$;
