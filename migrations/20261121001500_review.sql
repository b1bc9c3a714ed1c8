-- Rescues wait for nobody's locks for long, and a kind that a living worker serves is served, however seldom that one beats.
set lock_timeout = '10s';

-- As before, with an end to waiting: a caller that gave up leaves its statement waiting here, with all the locks that it has, and
-- `maskd.tend` has that of its worker's beats.
create or replace function maskd.rescue(worker uuid, unserved_seconds double precision) returns integer
language plpgsql set search_path = pg_catalog, pg_temp set enable_seqscan = off set lock_timeout = '2s' as $$
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
  begin
    perform maskd.promote_due();
    perform maskd.promote(array(select c.after from public.segmentation_results c
      left join public.segmentation_results p on p.id = c.after
      where c.status = 'waiting' and (p.id is null or p.status in ('done', 'error', 'canceled')) limit 500));
    if clock_timestamp() - me.steady_since > make_interval(secs => unserved_seconds) then
      perform maskd.end_unserved(unserved_seconds);
    end if;
  exception when lock_not_available then
    null;  -- somebody holds a row that waits: the next rescue tries again, and the rows of the dead are taken back all the same
  end;
  return taken;
end $$;

-- As before; `served_at` alone is old between two beats of a worker with a long lease.
create or replace function maskd.end_unserved(unserved_seconds double precision) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  since timestamptz := clock_timestamp() - make_interval(secs => unserved_seconds);
  ended uuid[];
begin
  with lonely as (
    select r.id from maskd.kinds k join public.segmentation_results r on r.kind = k.kind
     where (k.served_at is null or k.served_at < since) and not k.paused
       and not exists (select from maskd.workers w where k.kind = any (w.kinds) and w.beat_at > clock_timestamp() - w.lease)
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

-- The same end for the others that may meet a lock: what a caller gave up would wait on the server for as long as the lock is held,
-- one more connection with each new try.
alter function maskd.settle(jsonb) set lock_timeout = '3s';
alter function maskd.beat(uuid, double precision, jsonb, text[], uuid[], uuid[], uuid[], uuid[]) set lock_timeout = '3s';
alter function maskd.bury(uuid, uuid[]) set lock_timeout = '3s';
alter function maskd.leave(uuid) set lock_timeout = '3s';

-- Old projects let every role execute every new function: revoked by name, granted to the service alone.
revoke all on function maskd.rescue(uuid, double precision) from public, anon, authenticated;
grant execute on function maskd.rescue(uuid, double precision) to service_role;
revoke all on function maskd.end_unserved(double precision) from public, anon, authenticated;
grant execute on function maskd.end_unserved(double precision) to service_role;

insert into maskd.migrations (version, name) values ('20261121001500', 'review') on conflict do nothing;
