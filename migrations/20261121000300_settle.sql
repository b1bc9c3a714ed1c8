-- How a task ends. Every write about a task names its claim (id, token); a stale owner's write changes nothing.
set lock_timeout = '10s';

-- Lets the children of finished tasks go on, or fails them, and theirs. Called after the statement that finished the parents.
create or replace function maskd.promote(parents uuid[]) returns void
language plpgsql set search_path = '' as $$
declare
  failed uuid[] := parents;
  promoted boolean := false;
begin
  if not exists (select from public.segmentation_results c where c.status = 'waiting')
     or not exists (select from public.segmentation_results c where c.status = 'waiting' and c.after = any (parents)) then
    return;
  end if;
  update public.segmentation_results c
     set status = 'pending', pending_at = clock_timestamp(), updated_at = now(),
         fair_rank = maskd.rank(c.kind::text, coalesce(c.priority, 0)::smallint, c.user_id)
    from public.segmentation_results p
   where c.status = 'waiting' and c.after = any (parents) and p.id = c.after and p.status = 'done';
  promoted := found;
  while cardinality(failed) > 0 loop
    with ended as (
      update public.segmentation_results c
         set status = 'error', finished_at = now(), updated_at = now(), error = jsonb_build_object('code', 'after_failed',
             'message', 'The task that this one waited for did not end well; mend that one and send both again.')
       where c.status = 'waiting' and c.after = any (failed)
         and not exists (select from public.segmentation_results p
                          where p.id = c.after and p.status not in ('error', 'canceled'))
      returning c.id)
    select coalesce(array_agg(e.id), '{}') into failed from ended e;
  end loop;
  if promoted then
    perform pg_notify('maskd', '');
  end if;
end $$;

-- Writes outcomes [{id, token, fate, mask_image_url, masks_url, result_image_url, labels, metadata, code, message, delay, wrote}].
-- Returns the claims (id, token) that were not written: already (it ended under this very token before) or lost (the claim was
-- taken away; nothing changed). A worker may hold two claims of one task, an old and a new one: verdicts are per claim.
create or replace function maskd.settle(outcomes jsonb) returns table (id text, token text, verdict text)
language plpgsql set search_path = '' set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare
  named uuid[] := array(select (e.value ->> 'id')::uuid from jsonb_array_elements(outcomes) e);
  written uuid[];
  tokens uuid[];
  ended uuid[];
begin
  -- coalesce hides the status from the planner: by the index of held rows it would walk all of them instead of the few named.
  with o as (
    select * from jsonb_to_recordset(outcomes) as o (id uuid, token uuid, fate text, mask_image_url text, masks_url text,
      result_image_url text, labels jsonb, metadata jsonb, code text, message text, delay double precision)),
  changed as (
    update public.segmentation_results r
       set status = case when o.fate = 'done' then 'done'
                         when o.fate in ('released', 'suspect') then 'pending'
                         when o.fate = 'retry' and r.attempts < r.max_attempts then 'delayed'
                         else 'error' end,
           attempts = case when o.fate in ('released', 'suspect') then greatest(r.attempts - 1, 0) else r.attempts end,
           deaths = case when o.fate = 'suspect' then r.deaths + 1 else r.deaths end,
           run_after = case when o.fate = 'retry' then clock_timestamp() + make_interval(secs => coalesce(o.delay, 0)) else r.run_after end,
           pending_at = case when o.fate in ('released', 'suspect') then clock_timestamp() else r.pending_at end,
           finished_at = case when o.fate in ('done', 'failed') or o.fate = 'retry' and r.attempts >= r.max_attempts
                              then clock_timestamp() end,
           error = case when o.fate in ('failed', 'retry')
                        then jsonb_build_object('code', coalesce(o.code, 'internal'), 'message', coalesce(o.message, '')) end,
           mask_image_url = o.mask_image_url, masks_url = o.masks_url, result_image_url = o.result_image_url,
           labels = o.labels, metadata = o.metadata, updated_at = now()
      from o
     where r.id = any (named) and r.id = o.id and r.claim_token = o.token and coalesce(r.status, '') = 'processing'
    returning r.id, r.claim_token, r.status)
  select coalesce(array_agg(c.id), '{}'), coalesce(array_agg(c.claim_token), '{}'),
         coalesce(array_agg(c.id) filter (where c.status in ('done', 'error')), '{}')
    into written, tokens, ended from changed c;
  if cardinality(ended) > 0 then
    perform maskd.promote(ended);
  end if;
  if outcomes @> '[{"wrote": true}]' then
    insert into maskd.tombstones (project_id, task_id, claim_token, due_at)
      select r.project_id, r.id, o.token, now()
        from jsonb_to_recordset(outcomes) as o (id uuid, token uuid, fate text, wrote boolean)
        join public.segmentation_results r on r.id = o.id and r.claim_token = o.token
       where o.wrote and o.fate <> 'done' and o.id = any (written);
  end if;
  if cardinality(written) < jsonb_array_length(outcomes) then
    -- A statement of its own, so that it sees what a concurrent replay of the same outcomes has just committed.
    return query
      select o.id::text, o.token::text, case when r.id is not null then 'already' else 'lost' end
        from jsonb_to_recordset(outcomes) as o (id uuid, token uuid)
        left join public.segmentation_results r
          on r.id = o.id and r.claim_token = o.token and r.status not in ('processing', 'canceled')
       where not exists (select from unnest(written, tokens) w (id, token) where w.id = o.id and w.token = o.token);
  end if;
end $$;

-- Puts failed tasks back: those named, or those of one error code. Attempts and deaths start anew; nothing is charged again.
create or replace function maskd.retry(only_ids uuid[], only_code text, most integer) returns integer
language plpgsql set search_path = '' as $$
declare
  changed integer;
begin
  with chosen as (
    select r.id from public.segmentation_results r
     where r.status = 'error' and (only_ids is null or r.id = any (only_ids)) and (only_code is null or r.error ->> 'code' = only_code)
       and exists (select from maskd.kinds k where k.kind = r.kind)
       and (r.after is null or maskd.after_status(r.after, r.project_id) <> 'error')
     order by r.finished_at desc limit most for update skip locked)
  update public.segmentation_results r
     set status = case when r.after is null then 'pending' else maskd.after_status(r.after, r.project_id) end,
         attempts = 0, deaths = 0, error = null, finished_at = null, claim_token = null, worker_id = null,
         pending_at = clock_timestamp(), updated_at = now(), run_after = null,
         fair_rank = maskd.rank(r.kind::text, coalesce(r.priority, 0)::smallint, r.user_id)
    from chosen where r.id = chosen.id;
  get diagnostics changed = row_count;
  if changed > 0 then
    perform pg_notify('maskd', '');
  end if;
  return changed;
end $$;

insert into maskd.migrations (version, name) values ('20261121000300', 'settle') on conflict do nothing;
