-- The operator's side: tasks found, cancelled, put back and pruned in batches, kinds paused, and the queue at a glance. Each public
-- function answers with one jsonb, and is the same for callers by asyncpg and by PostgREST.
set lock_timeout = '10s';

-- What has ended, in the order in which it did: what status counts of the last minute, and what prune walks.
create index if not exists segmentation_results_ended on public.segmentation_results (status, finished_at, id)
  where status in ('done', 'error', 'canceled');

-- The tasks that are not over yet (with "failed", those in error) and meet what is wanted: {ids, kinds, project, code, older_seconds,
-- until, failed}; what is null or not said does not matter.
create or replace function maskd.fitting(wanted jsonb) returns table (id uuid, at timestamptz)
language plpgsql stable set search_path = '' set plan_cache_mode = force_custom_plan as $$
declare
  only_ids uuid[] := case when jsonb_typeof(wanted -> 'ids') = 'array'
    then array(select e::uuid from jsonb_array_elements_text(wanted -> 'ids') e) end;
  only_kinds text[] := case when jsonb_typeof(wanted -> 'kinds') = 'array'
    then array(select e from jsonb_array_elements_text(wanted -> 'kinds') e) end;
  only_project uuid := wanted ->> 'project';
  only_code text := wanted ->> 'code';
  failed boolean := coalesce((wanted ->> 'failed')::boolean, false);
  before timestamptz := (wanted ->> 'until')::timestamptz - make_interval(secs => coalesce((wanted ->> 'older_seconds')::float8, 0));
begin
  return query
    with every as (  -- one status each, so that each has its index
      select r.* from public.segmentation_results r where not failed and r.status = 'pending'
      union all select r.* from public.segmentation_results r where not failed and r.status = 'processing'
      union all select r.* from public.segmentation_results r where not failed and r.status = 'waiting'
      union all select r.* from public.segmentation_results r where not failed and r.status = 'delayed'
      union all select r.* from public.segmentation_results r where failed and r.status = 'error')
    select e.id, coalesce(e.created_at, 'epoch') from every e
     where (only_ids is null or e.id = any (only_ids)) and (only_kinds is null or e.kind = any (only_kinds))
       and (only_project is null or e.project_id = only_project) and (only_code is null or e.error ->> 'code' = only_code)
       and coalesce(e.created_at, 'epoch') <= before;
end $$;

-- A page of at most `most` of them, in the order of their creation (backwards with "newest_first"), behind `after` ({at, id}), and how
-- many there are from there on. The first answer's `until`, given back, keeps what is created meanwhile out of the other pages.
create or replace function maskd.find(wanted jsonb) returns jsonb
language plpgsql stable set search_path = '' as $$
declare
  newest_first boolean := coalesce((wanted ->> 'newest_first')::boolean, false);
  until timestamptz := coalesce((wanted ->> 'until')::timestamptz, clock_timestamp());
  last_at timestamptz := wanted #>> '{after,at}';
  last_id uuid := wanted #>> '{after,id}';
  found_count bigint;
  page jsonb;
begin
  with fit as materialized (
    select f.id, f.at from maskd.fitting(wanted || jsonb_build_object('until', until)) f
     where last_id is null or case when newest_first then (f.at, f.id) < (last_at, last_id) else (f.at, f.id) > (last_at, last_id) end),
  listed as (
    select f.id, f.at from fit f
     order by case when newest_first then f.at end desc, case when newest_first then f.id end desc, f.at, f.id
     limit (wanted ->> 'most')::integer)
  select (select count(*) from fit),
         (select jsonb_agg(jsonb_build_object('at', l.at, 'id', l.id)
            order by case when newest_first then l.at end desc, case when newest_first then l.id end desc, l.at, l.id) from listed l)
    into found_count, page;
  return jsonb_build_object('count', found_count, 'until', until, 'after', page -> -1,
    'ids', coalesce(jsonb_path_query_array(page, '$[*].id'), '[]'));
end $$;

-- Of these tasks, which are not over, those that are now locked together with all that waits for them. Waits for nobody, so that
-- whoever locks a whole chain by this can be in no deadlock over rows.
create or replace function maskd.lock_chains(ids uuid[]) returns uuid[]
language plpgsql set search_path = '' as $$
declare
  free uuid[] := array(
    select r.id from public.segmentation_results r
     where r.id = any (ids) and r.status in ('waiting', 'delayed', 'pending', 'processing') order by r.id for update skip locked);
  level uuid[] := free;
  children uuid[];
  held uuid[] := '{}';  -- by somebody else
begin
  while cardinality(level) > 0 loop
    children := array(select c.id from public.segmentation_results c where c.status = 'waiting' and c.after = any (level));
    level := array(select c.id from public.segmentation_results c where c.id = any (children) and c.status = 'waiting' for update skip locked);
    held := held || array(select unnest(children) except select unnest(level));
  end loop;
  return array(
    with recursive above as (
      select r.after as id from public.segmentation_results r where r.id = any (held)
      union select r.after from above a join public.segmentation_results r on r.id = a.id where r.after is not null)
    select f from unnest(free) f where not exists (select from above a where a.id = f));
end $$;

-- Cancels those of these tasks that are not over; `maskd.cancel` says what that means. Waits for nobody: rows that somebody holds at
-- this moment, or what waits for them, are `busy` and may be asked for again. `canceled` are all that are so by now, by whomever: the
-- call may be replayed.
create or replace function maskd.cancel_some(ids uuid[]) returns jsonb
language plpgsql set search_path = '' set lock_timeout = '5s' as $$
declare
  credits bigint;
  begun integer;
begin
  select coalesce(sum(c.refunded), 0), count(*) filter (where c.was = 'processing') into credits, begun
    from maskd.cancel(maskd.lock_chains(ids)) c;
  return jsonb_build_object('refunded', credits, 'running', begun,
    'canceled', (select count(*) from public.segmentation_results r where r.id = any (ids) and r.status = 'canceled'),
    'busy', (select coalesce(jsonb_agg(r.id), '[]') from public.segmentation_results r
              where r.id = any (ids) and r.status in ('waiting', 'delayed', 'pending', 'processing')));
end $$;

-- Puts those of these tasks back that are in error, parents before what waits for them; how many.
create or replace function maskd.retry_some(ids uuid[]) returns jsonb
language plpgsql set search_path = '' set lock_timeout = '5s' as $$
declare
  changed integer;
  total integer := 0;
begin
  loop
    changed := maskd.retry(ids, null, cardinality(ids));
    total := total + changed;
    exit when changed = 0;
  end loop;
  return jsonb_build_object('retried', total);
end $$;

-- Holds kinds back, or lets them go on: no names are all kinds. What runs already is finished. Rows of a kind that goes on get all
-- of the time again in which somebody must serve them; NOTIFY wakes who listens, and one row per kind is touched, since Realtime tells
-- of rows only. Names that are none change nothing.
create or replace function maskd.pause(names text[], stop boolean) returns jsonb
language plpgsql set search_path = '' set lock_timeout = '5s' as $$
declare
  unknown text[] := array(select n from unnest(names) n where not exists (select from maskd.kinds k where k.kind = n));
  changed text[] := '{}';
begin
  if cardinality(unknown) = 0 then
    with done as (
      update maskd.kinds k set paused = stop, served_at = case when stop then k.served_at else clock_timestamp() end
       where (coalesce(cardinality(names), 0) = 0 or k.kind = any (names)) and k.paused <> stop returning k.kind)
    select coalesce(array_agg(d.kind order by d.kind), '{}') into changed from done d;
  end if;
  if not stop and cardinality(changed) > 0 then
    update public.segmentation_results r set status = 'pending', updated_at = now() where r.id in (
      select head.id from unnest(changed) c (kind) cross join lateral (
        select p.id from public.segmentation_results p where p.kind = c.kind and p.status = 'pending' and p.deaths = 0
         order by p.priority desc, p.fair_rank, p.id limit 1 for update skip locked) head);
    perform pg_notify('maskd', '');
  end if;
  return jsonb_build_object('changed', changed, 'unknown', unknown, 'known', (select jsonb_agg(k.kind order by k.kind) from maskd.kinds k),
    'paused', (select coalesce(jsonb_agg(k.kind order by k.kind), '[]') from maskd.kinds k where k.paused));
end $$;

-- Which of these tasks a task that is not over yet still names: as the one before it, by its masks or by an image of its. Such tasks
-- are of the same users. Whatever looks like an id counts.
create or replace function maskd.still_named(ids uuid[]) returns uuid[]
language sql volatile set search_path = '' set enable_seqscan = off as $$
  with users as (select distinct r.user_id as id from public.segmentation_results r where r.id = any (ids)),
  live as (
    select r.after, r.source_image_url, r.params from users u join public.segmentation_results r on r.user_id = u.id and r.status = 'pending'
    union all select r.after, r.source_image_url, r.params from users u
      join public.segmentation_results r on r.user_id = u.id and r.status in ('waiting', 'delayed')
    union all select r.after, r.source_image_url, r.params from public.segmentation_results r where r.status = 'processing'),
  said as (
    select concat_ws(' ', l.after, l.source_image_url, l.params) as words from live l
     where l.after is not null or l.params <> '{}' or l.source_image_url like '%masks/%'),
  named as (
    select distinct replace(m.part[1], '-', '')::uuid as id from said s
     cross join lateral regexp_matches(s.words, '([0-9a-fA-F]{8}-?(?:[0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12})', 'g') m (part))
  select coalesce(array_agg(n.id), '{}') from named n where n.id = any (ids)
$$;

-- How many tasks prune would look at: {done, error, canceled} are the days that each is kept, in seconds; null keeps them for ever.
create or replace function maskd.prunable(kept jsonb) returns jsonb
language plpgsql stable set search_path = '' set plan_cache_mode = force_custom_plan set enable_seqscan = off as $$
declare
  ended text;
  before timestamptz;
  found_count bigint;
  answer jsonb := '{}';
begin
  foreach ended in array array['done', 'error', 'canceled'] loop
    continue when kept ->> ended is null;
    before := clock_timestamp() - make_interval(secs => (kept ->> ended)::float8);
    select count(*) into found_count from public.segmentation_results r
     where r.status in ('done', 'error', 'canceled') and r.status = ended and r.finished_at < before;
    answer := answer || jsonb_build_object(ended, jsonb_build_object('count', found_count, 'before', before));
  end loop;
  return answer;
end $$;

-- Deletes up to `most` tasks that ended so before then, behind `after` ({at, id}). Those that somebody holds, or that a live task still
-- names, stay: they are locked before that is asked, so that a task which comes meanwhile and names one as the one before it waits,
-- and then finds it gone. Nobody writes blobs of what has ended, so theirs may go at once.
create or replace function maskd.prune(ended text, before timestamptz, after jsonb, most integer) returns jsonb
language plpgsql set search_path = '' set plan_cache_mode = force_custom_plan set enable_seqscan = off set lock_timeout = '5s' as $$
declare
  last_at timestamptz := coalesce((after ->> 'at')::timestamptz, '-infinity');
  last_id uuid := coalesce((after ->> 'id')::uuid, '00000000-0000-0000-0000-000000000000');
  page jsonb;
  ids uuid[];
  free uuid[];
  gone uuid[];
begin
  select jsonb_agg(jsonb_build_object('at', p.finished_at, 'id', p.id)), coalesce(array_agg(p.id), '{}') into page, ids
    from (select r.id, r.finished_at from public.segmentation_results r
           where r.status in ('done', 'error', 'canceled') and r.status = ended and r.finished_at < before
             and (r.finished_at, r.id) > (last_at, last_id)
           order by r.finished_at, r.id limit most) p;
  free := array(select r.id from public.segmentation_results r
    where r.id = any (ids) and coalesce(r.status, '') = ended and r.finished_at < before for update skip locked);
  free := array(select unnest(free) except select unnest(maskd.still_named(free)));
  with deleted as (delete from public.segmentation_results r where r.id = any (free) returning r.id)
  select coalesce(array_agg(d.id), '{}') into gone from deleted d;
  update maskd.tombstones t set due_at = clock_timestamp()
   where t.due_at = now() + interval '5 minutes' and t.task_id = any (gone);  -- those that the trigger has just written
  return jsonb_build_object('deleted', cardinality(gone), 'kept', cardinality(ids) - cardinality(gone), 'after', page -> -1);
end $$;

-- What else would grow for ever: workers of which nothing was heard for a day and that hold nothing, where no other worker lived to
-- notice; and tombstones of blobs that a finished task has published after all.
create or replace function maskd.prune_leftovers() returns jsonb
language plpgsql set search_path = '' set enable_seqscan = off set lock_timeout = '5s' as $$
declare
  silent integer;
  moot integer;
begin
  delete from maskd.workers w where w.beat_at < now() - interval '1 day'
    and not exists (select from public.segmentation_results r where r.worker_id = w.id and r.status = 'processing');
  get diagnostics silent = row_count;
  delete from maskd.tombstones t where t.id in (
    select d.id from (select d.* from maskd.tombstones d where d.due_at < now() - interval '1 hour' order by d.due_at limit 5000) d
     where exists (select from public.segmentation_results r where r.id = d.task_id and r.claim_token = d.claim_token and r.status = 'done'));
  get diagnostics moot = row_count;
  return jsonb_build_object('workers', silent, 'tombstones', moot,
    'due', (select count(*) from (select from maskd.tombstones t where t.due_at <= now() limit 100000) few));
end $$;

-- Which of these attempts (tasks and tokens) own what they wrote: the tokens of those whose task runs or has published under them.
create or replace function maskd.owning(ids uuid[], tokens uuid[]) returns jsonb
language sql stable set search_path = '' as $$
  select coalesce(jsonb_agg(r.claim_token), '[]') from unnest(ids, tokens) a (id, token)
    join public.segmentation_results r on r.id = a.id and r.claim_token = a.token and r.status in ('processing', 'done')
$$;

-- A page of tasks that have ended, of whichever way, behind `after` ({at, id}): whose attempts may have left blobs behind.
create or replace function maskd.ended(how text, after jsonb, most integer) returns jsonb
language plpgsql stable set search_path = '' set plan_cache_mode = force_custom_plan set enable_seqscan = off as $$
declare
  last_at timestamptz := coalesce((after ->> 'at')::timestamptz, '-infinity');
  last_id uuid := coalesce((after ->> 'id')::uuid, '00000000-0000-0000-0000-000000000000');
  page jsonb;
begin
  select jsonb_agg(to_jsonb(p)) into page
    from (select r.finished_at as at, r.id, r.project_id as project from public.segmentation_results r
           where r.status in ('done', 'error', 'canceled') and r.status = how and (r.finished_at, r.id) > (last_at, last_id)
             and r.project_id is not null
           order by r.finished_at, r.id limit most) p;
  return coalesce(page, '[]');
end $$;

-- The queue at a glance: active tasks by kind and status (each status counted up to 100,000) with the age of the oldest; what ended in
-- the last minute, by kind (of the last 20,000); kinds; workers; last errors. No part of it reads more, however long the table is:
-- the minute begins at now(), since clock_timestamp() could not be looked up in an index.
create or replace function maskd.status() returns jsonb
language sql volatile set search_path = '' set enable_seqscan = off as $$
  with active as (
    (select r.kind, r.status, coalesce(r.pending_at, r.created_at) as since from public.segmentation_results r where r.status = 'pending' limit 100000)
    union all (select r.kind, r.status, coalesce(r.started_at, r.created_at) from public.segmentation_results r where r.status = 'processing' limit 100000)
    union all (select r.kind, r.status, r.created_at from public.segmentation_results r where r.status = 'waiting' limit 100000)
    union all (select r.kind, r.status, r.created_at from public.segmentation_results r where r.status = 'delayed' limit 100000)),
  ended as (
    (select r.kind, r.status, r.finished_at, r.created_at from public.segmentation_results r
      where r.status = 'done' and r.finished_at > now() - interval '1 minute' order by r.finished_at desc limit 20000)
    union all (select r.kind, r.status, r.finished_at, r.created_at from public.segmentation_results r
      where r.status = 'error' and r.finished_at > now() - interval '1 minute' order by r.finished_at desc limit 20000)),
  span as (
    select case when count(*) filter (where e.status = 'done') < 20000 and count(*) filter (where e.status = 'error') < 20000 then 60.0
                else greatest(extract(epoch from clock_timestamp() - min(e.finished_at)), 0.001) end as seconds from ended e)
  select jsonb_build_object(
    'tasks', (select coalesce(jsonb_agg(to_jsonb(c) order by c.kind, c.status), '[]') from (
      select a.kind, a.status, count(*) as count, round(extract(epoch from clock_timestamp() - min(a.since))::numeric, 1) as oldest_seconds
        from active a group by a.kind, a.status) c),
    'rates', (select coalesce(jsonb_agg(to_jsonb(c) order by c.kind), '[]') from (
      select e.kind, round((count(*) filter (where e.status = 'done') / s.seconds)::numeric, 2) as done_per_second,
             round((count(*) filter (where e.status = 'error') / s.seconds)::numeric, 2) as failed_per_second,
             round(extract(epoch from percentile_cont(0.5) within group (order by e.finished_at - e.created_at)
               filter (where e.status = 'done'))::numeric, 2) as seconds_p50,
             round(extract(epoch from percentile_cont(0.95) within group (order by e.finished_at - e.created_at)
               filter (where e.status = 'done'))::numeric, 2) as seconds_p95
        from ended e cross join span s group by e.kind, s.seconds) c),
    'kinds', (select coalesce(jsonb_agg(jsonb_build_object('kind', k.kind, 'paused', k.paused,
        'served', exists (select from maskd.workers w where k.kind = any (w.kinds) and w.beat_at > clock_timestamp() - w.lease)) order by k.kind), '[]')
      from maskd.kinds k),
    'workers', (select coalesce(jsonb_agg(jsonb_build_object('id', w.id, 'info', w.info, 'kinds', w.kinds,
        'silent_seconds', round(extract(epoch from clock_timestamp() - w.beat_at)::numeric, 1),
        'alive', w.beat_at > clock_timestamp() - w.lease) order by w.beat_at desc), '[]')
      from (select * from maskd.workers w order by w.beat_at desc limit 200) w),
    'errors', (select coalesce(jsonb_agg(to_jsonb(e)), '[]') from (
      select r.id, r.kind, r.finished_at, r.error ->> 'code' as code, r.error ->> 'message' as message,
             round(extract(epoch from clock_timestamp() - r.finished_at)::numeric, 1) as ago_seconds
        from public.segmentation_results r where r.status = 'error' and r.finished_at is not null order by r.finished_at desc limit 10) e))
$$;

create or replace function public.maskd_find(wanted jsonb) returns jsonb
language sql stable security invoker set search_path = '' as $$ select maskd.find(wanted) $$;

create or replace function public.maskd_cancel(ids uuid[]) returns jsonb
language sql volatile security invoker set search_path = '' as $$ select maskd.cancel_some(ids) $$;

create or replace function public.maskd_retry_some(ids uuid[]) returns jsonb
language sql volatile security invoker set search_path = '' as $$ select maskd.retry_some(ids) $$;

create or replace function public.maskd_pause(names text[], stop boolean) returns jsonb
language sql volatile security invoker set search_path = '' as $$ select maskd.pause(names, stop) $$;

create or replace function public.maskd_paused() returns jsonb
language sql stable security invoker set search_path = '' as $$
  select coalesce(jsonb_agg(k.kind order by k.kind), '[]') from maskd.kinds k where k.paused
$$;

create or replace function public.maskd_prunable(kept jsonb) returns jsonb
language sql stable security invoker set search_path = '' as $$ select maskd.prunable(kept) $$;

create or replace function public.maskd_prune(ended text, before text, after jsonb, most integer) returns jsonb
language sql volatile security invoker set search_path = '' as $$ select maskd.prune(ended, before::timestamptz, after, most) $$;

create or replace function public.maskd_prune_leftovers() returns jsonb
language sql volatile security invoker set search_path = '' as $$ select maskd.prune_leftovers() $$;

create or replace function public.maskd_ended(how text, after jsonb, most integer) returns jsonb
language sql stable security invoker set search_path = '' as $$ select maskd.ended(how, after, most) $$;

create or replace function public.maskd_owning(ids uuid[], tokens uuid[]) returns jsonb
language sql stable security invoker set search_path = '' as $$ select maskd.owning(ids, tokens) $$;

-- Old projects let every role execute every new function: revoked by name, granted to the service alone.
do $$
declare
  f text;
begin
  foreach f in array array['maskd.fitting(jsonb)', 'maskd.find(jsonb)', 'maskd.lock_chains(uuid[])',
    'maskd.cancel_some(uuid[])', 'maskd.retry_some(uuid[])',
    'maskd.pause(text[], boolean)', 'maskd.still_named(uuid[])', 'maskd.prunable(jsonb)',
    'maskd.prune(text, timestamptz, jsonb, integer)', 'maskd.prune_leftovers()', 'maskd.owning(uuid[], uuid[])', 'maskd.ended(text, jsonb, integer)',
    'maskd.status()', 'public.maskd_find(jsonb)', 'public.maskd_cancel(uuid[])', 'public.maskd_retry_some(uuid[])',
    'public.maskd_pause(text[], boolean)', 'public.maskd_paused()', 'public.maskd_prunable(jsonb)',
    'public.maskd_prune(text, text, jsonb, integer)', 'public.maskd_prune_leftovers()', 'public.maskd_ended(text, jsonb, integer)',
    'public.maskd_owning(uuid[], uuid[])'] loop
    execute format('revoke all on function %s from public, anon, authenticated', f);
    execute format('grant execute on function %s to service_role', f);
  end loop;
end $$;

-- PostgREST knows the functions from when it last looked; nobody listens on a plain Postgres.
notify pgrst, 'reload schema';

insert into maskd.migrations (version, name) values ('20261121001300', 'operator') on conflict do nothing;
