-- One call for a worker that holds nothing, instead of five; and the operator's commands for callers over HTTP.
set lock_timeout = '10s';

-- The beat of a worker that holds nothing, a rescue, the tombstones that are due, and a look at the queue. Null when the worker is
-- not known any more: then it has to beat with all that there is to say of it. Whoever holds rows keeps to `beat` and `rescue`, so
-- that a rescue that fails or waits takes no beat with it that matters.
-- `work` says whether a claim would find something now, or within `ahead_seconds`; `silent_seconds` when the next worker that holds
-- rows will have been silent for its whole lease: who looks again then is not late for it, however seldom it looks otherwise.
create or replace function maskd.tend(worker uuid, lease_seconds double precision, unserved_seconds double precision, most integer,
  ahead_seconds double precision) returns jsonb
language plpgsql set search_path = '' set enable_seqscan = off set lock_timeout = '2s' as $$
declare
  me maskd.workers;
  taken integer;
begin
  select * into me from maskd.workers w where w.id = worker;
  if me.id is null then
    return null;
  end if;
  perform maskd.beat(worker, lease_seconds, me.info, me.kinds, '{}', '{}', '{}', '{}');
  taken := maskd.rescue(worker, unserved_seconds);
  return jsonb_build_object(
    'rescued', taken,
    'tombstones', (select coalesce(jsonb_agg(to_jsonb(t)), '[]') from maskd.due_tombstones(most) t),
    'work',
      exists (select from maskd.kinds k
               cross join lateral (select from public.segmentation_results r
                 where r.kind = k.kind and r.status = 'pending' and r.deaths = 0 limit 1) head
               where k.kind = any (me.kinds) and not k.paused)
      or exists (select from public.segmentation_results r
                  where r.status = 'delayed' and r.run_after <= clock_timestamp() + make_interval(secs => ahead_seconds))
      or cardinality(maskd.suspect_kinds(me.kinds)) > 0,
    'silent_seconds', (
      select extract(epoch from min(w.beat_at + w.lease) - clock_timestamp())::float8 from maskd.workers w
       where w.id <> worker
         and exists (select from public.segmentation_results r where r.worker_id = w.id and r.status = 'processing')));
end $$;

create or replace function public.maskd_tend(worker uuid, lease_seconds double precision, unserved_seconds double precision,
  most integer, ahead_seconds double precision) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select maskd.tend(worker, lease_seconds, unserved_seconds, most, ahead_seconds)
$$;

-- Inserts one task, as the Edge does, under an id that the caller makes: a replay inserts nothing. The id.
create or replace function public.maskd_submit(task jsonb) returns jsonb
language plpgsql volatile security invoker set search_path = '' as $$
declare
  task_id uuid := (task ->> 'id')::uuid;
begin
  if task_id is null then
    raise exception 'a task needs an id' using errcode = 'PT400';
  end if;
  perform pg_advisory_xact_lock(hashtextextended(task_id::text, 0));  -- a replay may overtake the call whose reply was lost
  if not exists (select from public.segmentation_results r where r.id = task_id) then
    insert into public.segmentation_results (id, project_id, kind, source_image_url, text_prompt, params, priority, after)
      values (task_id, (task ->> 'project_id')::uuid, task ->> 'kind', task ->> 'source_image_url', task ->> 'text_prompt',
              task -> 'params', (task ->> 'priority')::integer, (task ->> 'after')::uuid);
  end if;
  return to_jsonb(task_id);
end $$;

-- What has become of these tasks.
create or replace function public.maskd_rows(ids uuid[]) returns jsonb
language sql stable security invoker set search_path = '' as $$
  select coalesce(jsonb_agg(to_jsonb(f)), '[]') from (
    select r.id, r.kind, r.status, r.attempts, r.deaths, r.source_image_url, r.mask_image_url, r.masks_url, r.result_image_url,
           r.labels, r.metadata, r.error, extract(epoch from r.finished_at - r.created_at)::float8 as seconds
      from public.segmentation_results r where r.id = any (ids) limit 1000) f
$$;

-- [{user_id, project_id}], oldest first.
create or replace function public.maskd_projects(most integer) returns jsonb
language sql stable security invoker set search_path = '' as $$
  select coalesce(jsonb_agg(to_jsonb(f)), '[]') from (
    select p.user_id, p.id as project_id from public.projects p order by p.created_at limit most) f
$$;

-- Old projects let every role execute every new function: revoked by name, granted to the service alone.
do $$
declare
  f text;
begin
  foreach f in array array['maskd.tend(uuid, double precision, double precision, integer, double precision)',
    'public.maskd_tend(uuid, double precision, double precision, integer, double precision)',
    'public.maskd_submit(jsonb)', 'public.maskd_rows(uuid[])', 'public.maskd_projects(integer)']
  loop
    execute format('revoke all on function %s from public, anon, authenticated', f);
    execute format('grant execute on function %s to service_role', f);
  end loop;
end $$;

-- PostgREST knows the functions from when it last looked; nobody listens on a plain Postgres.
notify pgrst, 'reload schema';

insert into maskd.migrations (version, name) values ('20261121001000', 'rpc_idle') on conflict do nothing;
