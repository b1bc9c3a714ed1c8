-- Who is alive. One small row per worker is beaten; rows of a worker that fell silent go back; who died with what is counted.
set lock_timeout = '10s';

-- Notes that a worker lives, by the database's clock, and what it holds. Rows of this worker that it does not hold (a claim whose
-- reply was lost; not those of claims still open, nor fresh ones) go back. Returns held claims that are no longer its own.
create or replace function maskd.beat(worker uuid, lease_seconds double precision, worker_info jsonb, worker_kinds text[],
  held_ids uuid[], held_tokens uuid[], begun_ids uuid[], open_tokens uuid[]) returns table (id text, token text)
language plpgsql set search_path = '' as $$
declare
  lease_interval interval := make_interval(secs => lease_seconds);
begin
  insert into maskd.workers as w (id, beat_at, steady_since, lease, info, kinds, begun)
    values (worker, clock_timestamp(), clock_timestamp(), lease_interval, worker_info, worker_kinds, begun_ids)
    on conflict on constraint workers_pkey do update
       set beat_at = excluded.beat_at, lease = excluded.lease, info = excluded.info, kinds = excluded.kinds, begun = excluded.begun,
           steady_since = case when excluded.beat_at - w.beat_at > w.lease then excluded.beat_at else w.steady_since end;
  update maskd.kinds k set served_at = clock_timestamp()
   where k.kind in (select s.kind from maskd.kinds s
     where s.kind = any (worker_kinds) and (s.served_at is null or s.served_at < clock_timestamp() - interval '10 seconds')
     for update skip locked);  -- whoever holds a kind open must not hold up a beat
  perform maskd.give_back(array(
    select r.id from public.segmentation_results r
     where r.worker_id = worker and r.status = 'processing'
       and r.started_at < clock_timestamp() - lease_interval / 3 - interval '10 seconds'  -- as long as a beat may be under way
       and r.claim_token <> all (open_tokens)
       and not exists (select from unnest(held_ids, held_tokens) h (id, token) where h.id = r.id and h.token = r.claim_token)
     for update skip locked));
  return query
    select h.id::text, h.token::text from unnest(held_ids, held_tokens) h (id, token)
      left join public.segmentation_results r on r.id = h.id and r.claim_token = h.token and r.status = 'processing'
     where r.id is null;
end $$;

-- Rows that were claimed and never begun: back to pending, with their attempt.
create or replace function maskd.give_back(ids uuid[]) returns void
language sql set search_path = '' as $$
  insert into maskd.tombstones (project_id, task_id, claim_token, due_at)
    select r.project_id, r.id, r.claim_token, clock_timestamp() + interval '1 minute' from public.segmentation_results r
     where r.id = any (ids) and r.status = 'processing' and r.claim_token is not null and r.project_id is not null;
  update public.segmentation_results r
     set status = 'pending', attempts = greatest(r.attempts - 1, 0), worker_id = null, claim_token = null,
         pending_at = clock_timestamp(), updated_at = now()
   where r.id = any (ids) and r.status = 'processing';
  select pg_notify('maskd', '') where cardinality(ids) > 0
$$;

-- Rows of dead workers go back. One that was begun when its worker died counts a death and gets its attempt back: such rows run
-- apart, and only deaths alone (the third and fourth) end it. Of the others nobody knows whether they had begun: the attempt is
-- spent, the first time without delay; out of attempts they become suspects too, so that no healthy row is ever given up.
create or replace function maskd.take_back(ids uuid[], begun_ids uuid[]) returns integer
language plpgsql set search_path = '' as $$
declare
  ended uuid[];
begin
  insert into maskd.tombstones (project_id, task_id, claim_token, due_at)
    select r.project_id, r.id, r.claim_token, clock_timestamp() + coalesce(w.lease, interval '30 seconds')
      from public.segmentation_results r left join maskd.workers w on w.id = r.worker_id
     where r.id = any (ids) and r.claim_token is not null and r.project_id is not null;
  with fate as (
    select r.id, b.begun, b.begun and r.deaths >= 3 as poison, not b.begun and r.attempts >= r.max_attempts as spent
      from public.segmentation_results r cross join lateral (select r.id = any (begun_ids) as begun) b where r.id = any (ids)),
  changed as (
    update public.segmentation_results r
       set status = case when f.poison then 'error' when f.begun or f.spent or r.attempts = 1 then 'pending' else 'delayed' end,
           attempts = case when f.begun then greatest(r.attempts - 1, 0) when f.spent then 0 else r.attempts end,
           deaths = case when f.begun then r.deaths + 1 when f.spent then greatest(r.deaths, 1) else r.deaths end,
           run_after = clock_timestamp() + make_interval(secs => power(2, least(r.attempts, 6))),
           error = case when f.poison then jsonb_build_object('code', 'poison',
             'message', 'Work on this task ended its worker each time it ran alone; send another image or other parameters.') end,
           finished_at = case when f.poison then clock_timestamp() end,
           worker_id = null, claim_token = null, pending_at = clock_timestamp(), updated_at = now()
      from fate f where r.id = f.id and r.status = 'processing'
    returning r.id, r.status)
  select coalesce(array_agg(c.id), '{}') into ended from changed c where c.status = 'error';
  perform maskd.promote(ended);
  if cardinality(ids) > 0 then
    perform pg_notify('maskd', '');
  end if;
  return cardinality(ids);
end $$;

-- A worker that was found dead by its successor on the same host, which knows from the journal what had begun.
create or replace function maskd.bury(worker uuid, begun_ids uuid[]) returns integer
language plpgsql set search_path = '' as $$
declare
  taken integer;
begin
  taken := maskd.take_back(array(
    select r.id from public.segmentation_results r where r.worker_id = worker and r.status = 'processing' for update), begun_ids);
  delete from maskd.workers w where w.id = worker;
  return taken;
end $$;

-- A worker that leaves in good order holds nothing any more. What it released a moment ago is announced to the others now.
create or replace function maskd.leave(worker uuid) returns void
language sql set search_path = '' as $$
  select maskd.give_back(array(select r.id from public.segmentation_results r where r.worker_id = worker and r.status = 'processing' for update));
  delete from maskd.workers w where w.id = worker;
  select pg_notify('maskd', '')
$$;

-- Done by every worker every few seconds, effectively by one at a time. Only a worker that has itself been beating without a gap
-- for a whole lease may call others dead: after an outage of the database everybody looks silent.
create or replace function maskd.rescue(worker uuid, unserved_seconds double precision) returns integer
language plpgsql set search_path = '' set enable_seqscan = off as $$
declare
  me maskd.workers;
  silent uuid[];
  taken integer;
begin
  select * into me from maskd.workers w where w.id = worker;
  if me.id is null or clock_timestamp() - me.steady_since < me.lease or clock_timestamp() - me.beat_at > me.lease
     or not pg_try_advisory_xact_lock(hashtextextended('maskd.rescue', 0)) then
    return 0;
  end if;
  silent := array(select w.id from maskd.workers w where w.beat_at < clock_timestamp() - w.lease for update skip locked);
  taken := maskd.take_back(
    array(select r.id from public.segmentation_results r
           where r.status = 'processing'
             and r.worker_id is not null  -- an adopted table may have rows of other workers
             and (r.worker_id = any (silent) or not exists (select from maskd.workers w where w.id = r.worker_id))
           for update skip locked),
    array(select unnest(w.begun) from maskd.workers w where w.id = any (silent)));
  delete from maskd.workers w where w.id = any (silent) and w.beat_at < clock_timestamp() - w.lease
    and not exists (select from public.segmentation_results r where r.worker_id = w.id and r.status = 'processing');
  perform maskd.promote_due();
  perform maskd.promote(array(select c.after from public.segmentation_results c
    left join public.segmentation_results p on p.id = c.after
    where c.status = 'waiting' and (p.id is null or p.status in ('done', 'error', 'canceled')) limit 500));
  if clock_timestamp() - me.steady_since > make_interval(secs => unserved_seconds) then
    perform maskd.end_unserved(unserved_seconds);
  end if;
  return taken;
end $$;

-- Pending rows that no live worker could have served for so long end, instead of waiting for ever.
create or replace function maskd.end_unserved(unserved_seconds double precision) returns void
language plpgsql set search_path = '' as $$
declare
  since timestamptz := clock_timestamp() - make_interval(secs => unserved_seconds);
  ended uuid[];
begin
  with lonely as (
    select r.id from maskd.kinds k join public.segmentation_results r on r.kind = k.kind
     where (k.served_at is null or k.served_at < since) and not k.paused
       and r.status = 'pending' and coalesce(r.pending_at, r.created_at) < since
     limit 1000 for update of r skip locked),
  changed as (
    update public.segmentation_results r
       set status = 'error', finished_at = clock_timestamp(), updated_at = now(), error = jsonb_build_object('code', 'engine_unavailable',
           'message', format('No running worker can do "%s" at present; try again later.', r.kind))
      from lonely where r.id = lonely.id returning r.id)
  select coalesce(array_agg(c.id), '{}') into ended from changed c;
  perform maskd.promote(ended);
end $$;

-- Tombstones that are due, put off by a minute so that nobody else takes them meanwhile; `bury_tombstones` ends them.
create or replace function maskd.due_tombstones(most integer) returns table (id bigint, prefix text)
language sql set search_path = '' as $$
  update maskd.tombstones t set due_at = clock_timestamp() + interval '1 minute'
   where t.id in (select d.id from maskd.tombstones d
                   where d.due_at <= clock_timestamp()
                     and not exists (select from public.segmentation_results r
                       where r.id = d.task_id
                         and (d.claim_token is null or r.claim_token = d.claim_token and r.status in ('processing', 'done')))
                   order by d.due_at limit most for update skip locked)
  returning t.id, format('masks/%s/%s/', t.project_id, t.task_id) || coalesce(t.claim_token::text || '/', '')
$$;

create or replace function maskd.bury_tombstones(ids bigint[]) returns void
language sql set search_path = '' as $$ delete from maskd.tombstones t where t.id = any (ids) $$;

-- Where the masks of an earlier task of the same project lie; null unless it is done.
create or replace function maskd.masks_of(task uuid, project uuid) returns text
language sql stable set search_path = '' as $$
  select r.masks_url from public.segmentation_results r where r.id = task and r.project_id = project and r.status = 'done'
$$;

-- The queue at a glance: active rows by kind and status (counted up to 100,000), the oldest pending one, live workers, last errors.
create or replace function maskd.status() returns jsonb
language sql volatile set search_path = '' as $$
  select jsonb_build_object(
    'tasks', (select coalesce(jsonb_agg(to_jsonb(c) order by c.kind, c.status), '[]') from (
      select few.kind, few.status, count(*) as count, round(extract(epoch from clock_timestamp() - min(few.since))::numeric, 1) as oldest_seconds
        from (select r.kind, r.status, coalesce(r.started_at, r.pending_at, r.created_at) as since from public.segmentation_results r
               where r.status in ('pending', 'processing', 'delayed', 'waiting') limit 100000) few
       group by few.kind, few.status) c),
    'kinds', (select coalesce(jsonb_agg(jsonb_build_object('kind', k.kind, 'paused', k.paused,
        'served', exists (select from maskd.workers w where k.kind = any (w.kinds) and w.beat_at > clock_timestamp() - w.lease)) order by k.kind), '[]')
      from maskd.kinds k),
    'workers', (select coalesce(jsonb_agg(jsonb_build_object('id', w.id, 'info', w.info, 'kinds', w.kinds,
        'silent_seconds', round(extract(epoch from clock_timestamp() - w.beat_at)::numeric, 1),
        'alive', w.beat_at > clock_timestamp() - w.lease) order by w.beat_at desc), '[]') from maskd.workers w),
    'errors', (select coalesce(jsonb_agg(to_jsonb(e)), '[]') from (
      select r.id, r.kind, r.finished_at, r.error ->> 'code' as code, r.error ->> 'message' as message
        from public.segmentation_results r where r.status = 'error' order by r.finished_at desc limit 10) e))
$$;

create or replace function public.maskd_version() returns text
language sql stable set search_path = '' as $$ select max(m.version) from maskd.migrations m $$;

-- Old projects let every role execute every new function: revoked by name, granted to the service alone.
do $$
declare
  f regprocedure;
begin
  for f in select p.oid from pg_proc p join pg_namespace n on n.oid = p.pronamespace
            where n.nspname = 'maskd' or n.nspname = 'public' and p.proname = 'maskd_version' loop
    execute format('revoke all on function %s from public, anon, authenticated', f);
    execute format('grant execute on function %s to service_role', f);
  end loop;
end $$;

insert into maskd.migrations (version, name) values ('20261121000400', 'lease') on conflict do nothing;
