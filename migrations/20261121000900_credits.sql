-- What tasks cost and who pays: prices by kind and tier, one charge for an inserted row, one refund for a row that failed or never
-- began; and the two functions that an Edge API calls with its user's token.
set lock_timeout = '10s';

do $$
declare
  wrong text;
begin
  select string_agg(format('public.usage_logs.%s', c.column_name), ', ' order by c.ordinal_position) into wrong
    from information_schema.columns c
   where c.table_schema = 'public' and c.table_name = 'usage_logs' and c.is_nullable = 'NO'
     and c.column_default is null and c.is_identity = 'NO' and c.is_generated = 'NEVER'
     and c.column_name not in ('user_id', 'action', 'credits_used', 'created_at', 'task_id');
  if wrong is not null then
    raise exception 'maskd cannot adopt these tables: % may not be null and has no default, and a use is logged without it; give it a default or let it be null first', wrong;
  end if;
  begin  -- nothing of this stays
    insert into public.usage_logs (user_id, action, credits_used) values
      (gen_random_uuid(), 'segment_visual', 1), (gen_random_uuid(), 'convert_image', 0), (gen_random_uuid(), 'refund', -1);
    raise exception using errcode = 'P0002';
  exception
    when check_violation then
      raise exception 'maskd cannot adopt these tables: %; actions are the names of kinds and "refund", whose credits_used are below 0; widen or drop that check first', sqlerrm;
    when others then null;
  end;
end $$;

create table if not exists maskd.prices (
  kind text not null references maskd.kinds (kind) on delete cascade,
  tier text not null,
  credits integer not null check (credits >= 0),
  primary key (kind, tier)
);
insert into maskd.prices (kind, tier, credits)
  select k.kind, t.tier, case when k.kind in ('combine_masks', 'paint_masks', 'convert_image') then 0
                              when k.kind in ('segment_everything', 'remove_object', 'replace_background') then 2
                              when k.kind = 'fill_object' then 5 else 1 end
    from maskd.kinds k cross join unnest(array['free', 'basic', 'pro', 'enterprise']) t (tier)
  on conflict do nothing;

alter table public.usage_logs add column if not exists task_id uuid;

-- Failed rows whose charge is still to be given back: none, but within a transaction, or where the database refused the refund.
create index if not exists segmentation_results_refund on public.segmentation_results (id) where status = 'error' and charged > 0;
create index if not exists segmentation_results_not_yet on public.segmentation_results (user_id) where status in ('waiting', 'delayed');

-- Whether the caller is the service or the owner of these functions; everybody else is a user. Inside a function of somebody
-- else's rights current_user says nothing, but the role that was set does.
create or replace function maskd.is_service() returns boolean
language sql stable security definer set search_path = '' as $$
  select caller.name = current_user or pg_has_role(caller.name, 'service_role', 'usage')
    from (select case when coalesce(current_setting('role', true), 'none') in ('none', '') then session_user::text
                      else current_setting('role') end) caller (name)
$$;

-- What a row of this kind costs a user of this tier. A tier without a price pays what the free one pays.
create or replace function maskd.price(row_kind text, user_tier text) returns integer
language sql stable set search_path = '' as $$
  select coalesce((select p.credits from maskd.prices p where p.kind = row_kind and p.tier = user_tier),
                  (select p.credits from maskd.prices p where p.kind = row_kind and p.tier = 'free'), 1)
$$;

-- Takes what a new row costs. Runs after the insert, so that a row which met a conflict and was not inserted costs nothing.
create or replace function maskd.charge() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  left_over integer;
begin
  update public.users_profile p set credits = p.credits - new.charged where p.id = new.user_id and p.credits >= new.charged;
  if not found then
    select p.credits into left_over from public.users_profile p where p.id = new.user_id;
    raise exception using errcode = 'PT402', detail = 'credits_missing',
      message = format('%s costs %s credits and %s are left; buy some, or wait until failed tasks are refunded.', new.kind, new.charged, coalesce(left_over, 0));
  end if;
  insert into public.usage_logs (user_id, action, credits_used, task_id) values (new.user_id, new.kind, new.charged, new.id);
  return null;
end $$;

-- Gives back what these rows hold. Their charge becomes 0 in the same transaction, so never twice. Profiles are locked in the order
-- of their ids, and after all rows: two that refund at once never wait for each other crosswise.
create or replace function maskd.give_credits_back(ids uuid[]) returns void
language plpgsql set search_path = '' as $$
declare
  due record;
begin
  perform from public.segmentation_results r where r.id = any (ids) and r.charged > 0 order by r.id for update;
  for due in
    select r.user_id, array_agg(r.id) as tasks, array_agg(r.charged) as charges
      from public.segmentation_results r where r.id = any (ids) and r.charged > 0 group by r.user_id order by r.user_id
  loop
    if maskd.refund_user(due.user_id, due.tasks, due.charges::integer[]) then
      update public.segmentation_results r set charged = 0, updated_at = now() where r.id = any (due.tasks);
    end if;
  end loop;
end $$;

-- Pays back and logs what these tasks of one user cost; false when the database refuses that (a balance that is full, a check or
-- trigger of the project's own): then the tasks keep their charge, since no refund may keep a task from ending, or a worker alive.
create or replace function maskd.refund_user(owner uuid, tasks uuid[], charges integer[]) returns boolean
language plpgsql set search_path = '' as $$
begin
  update public.users_profile p set credits = coalesce(p.credits, 0) + (select sum(c) from unnest(charges) c) where p.id = owner;
  insert into public.usage_logs (user_id, action, credits_used, task_id)
    select p.id, 'refund', -t.charge, t.id from public.users_profile p cross join unnest(tasks, charges) t (id, charge) where p.id = owner;
  return true;
exception when others then
  if sqlstate ~ '^(40|53|55|57|58|XX)' then  -- nothing to do with the refund: asking again helps
    raise;
  end if;
  raise warning 'maskd: user % was not refunded for the tasks %: % (%)', owner, tasks, sqlerrm, sqlstate;
  return false;
end $$;

-- One user cannot fill the queue: PT429 becomes HTTP 429 behind PostgREST. Counted is what waits for a worker, in whatever way;
-- inserts of one user come one after the other, so that none overlooks another.
create or replace function maskd.refuse_too_many(owner uuid) returns void
language plpgsql volatile set search_path = '' as $$
declare
  most integer := (select (s.value #>> '{}')::integer from maskd.settings s where s.key = 'active_rows_max');
  active integer;
begin
  perform pg_advisory_xact_lock(hashtextextended('maskd.user.' || coalesce(owner::text, ''), 0));
  select count(*) into active from (
    (select from public.segmentation_results r where r.user_id = owner and r.status = 'pending' limit most)
    union all
    (select from public.segmentation_results r where r.user_id = owner and r.status in ('waiting', 'delayed') limit most)) few;
  if active >= most then
    raise exception using errcode = 'PT429', detail = 'too_many_tasks',
      message = format('There are already %s tasks waiting; try again when some are done.', active);
  end if;
end $$;

-- As before, and whoever is not the service pays; the service pays where it inserts with charged > 0, at the same price.
create or replace function maskd.before_insert() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  by_user boolean := not maskd.is_service();
  pays boolean := by_user or new.charged > 0;
  tier text;
begin
  if not by_user and new.status in ('done', 'error', 'canceled') then
    return new;  -- a trusted import of finished rows
  end if;
  select p.user_id, u.tier into new.user_id, tier
    from public.projects p left join public.users_profile u on u.id = p.user_id where p.id = new.project_id
     for key share of p;  -- as the foreign key does later, but before the parent's row is locked: in the order of a delete
  if by_user and (select auth.uid()) is distinct from new.user_id and (select auth.uid()) is not null then
    -- As the policy would say after this; before it, so that nothing is learned of the other's queue, and none of it locked.
    raise insufficient_privilege using message = 'new row violates row-level security policy for table "segmentation_results"';
  end if;
  new.attempts := 0; new.deaths := 0; new.worker_id := null; new.claim_token := null; new.error := null; new.charged := 0;
  new.mask_image_url := null; new.masks_url := null; new.result_image_url := null; new.labels := null; new.metadata := null;
  new.started_at := null; new.finished_at := null; new.created_at := now(); new.updated_at := now();
  new.params := coalesce(new.params, '{}');
  if by_user then
    new.priority := null; new.run_after := null; new.max_attempts := 3;
    perform maskd.refuse_too_many(new.user_id);
  end if;
  new.priority := coalesce(new.priority,
    (select (s.value ->> tier)::smallint from maskd.settings s where s.key = 'priorities'), 0);
  new.error := maskd.refusal(new);
  if new.error is null and new.after is not null then
    new.status := maskd.after_status(new.after, new.project_id);
    if new.status = 'error' then
      new.error := jsonb_build_object('code', 'after_failed', 'message',
        'The task named by "after" is not of this project, does not exist or has failed.');
    end if;
  else
    new.status := case when new.run_after > now() then 'delayed' else 'pending' end;
  end if;
  if new.error is not null then
    new.status := 'error'; new.finished_at := now();
    if octet_length(new.params::text) > 65536 then new.params := '{}'; end if;
    new.text_prompt := left(new.text_prompt, 1000); new.source_image_url := left(new.source_image_url, 2000); new.kind := left(new.kind, 200);
    return new;
  end if;
  if pays then
    new.charged := maskd.price(new.kind::text, tier);
  end if;
  if new.status = 'pending' then
    new.pending_at := clock_timestamp();
    new.fair_rank := maskd.rank(new.kind::text, new.priority::smallint, new.user_id);
  end if;
  return new;
end $$;

drop trigger if exists maskd_charge on public.segmentation_results;
create trigger maskd_charge after insert on public.segmentation_results
  for each row when (new.charged > 0 and new.status in ('waiting', 'delayed', 'pending')) execute function maskd.charge();

-- The blobs of a deleted task are nobody's any more, what waits for it waits in vain, and what had not begun is refunded.
create or replace function maskd.after_delete() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if old.claim_token is not null and old.project_id is not null then  -- earlier attempts have tombstones of their own
    insert into maskd.tombstones (project_id, task_id, claim_token, due_at)
      values (old.project_id, old.id, old.claim_token, now() + interval '5 minutes');
  end if;
  perform maskd.promote(array[old.id]);
  if old.charged > 0 and old.status in ('waiting', 'delayed', 'pending')
     and exists (select from auth.users u where u.id = old.user_id) then  -- not when the user is being deleted too
    perform maskd.refund_user(old.user_id, array[old.id], array[old.charged::integer]);
  end if;
  return null;
end $$;

-- Hands on what became of these tasks to those that waited for them: parents that are done promote them, others fail them, and what
-- waits for those, and so on. Returns the failed ones, whose refund is the caller's matter: rows are locked before profiles, always.
create or replace function maskd.hand_on(parents uuid[]) returns uuid[]
language plpgsql set search_path = '' as $$
declare
  level uuid[] := parents;
  failed uuid[] := '{}';
begin
  if not exists (select from public.segmentation_results c where c.status = 'waiting')
     or not exists (select from public.segmentation_results c where c.status = 'waiting' and c.after = any (parents)) then
    return failed;
  end if;
  update public.segmentation_results c
     set status = 'pending', pending_at = clock_timestamp(), updated_at = now(),
         source_image_url = coalesce(nullif(c.source_image_url, ''), maskd.image_after(p.id)),
         fair_rank = maskd.rank(c.kind::text, coalesce(c.priority, 0)::smallint, c.user_id)
    from public.segmentation_results p
   where c.status = 'waiting' and c.after = any (parents) and p.id = c.after and p.status = 'done';
  if found then
    perform pg_notify('maskd', '');
  end if;
  while cardinality(level) > 0 loop
    with ended as (
      update public.segmentation_results c
         set status = 'error', finished_at = now(), updated_at = now(), error = jsonb_build_object('code', 'after_failed',
             'message', 'The task that this one waited for did not end well; mend that one and send both again.')
       where c.status = 'waiting' and c.after = any (level)
         and not exists (select from public.segmentation_results p
                          where p.id = c.after and p.status not in ('error', 'canceled'))
      returning c.id)
    select coalesce(array_agg(e.id), '{}') into level from ended e;
    failed := failed || level;
  end loop;
  return failed;
end $$;

-- After tasks have ended: what waited for them begins, or fails with them; and all that failed are refunded, last and all at once, so
-- that whoever waits for a row here holds no profile that the row's holder may want.
create or replace function maskd.promote(parents uuid[]) returns void
language plpgsql set search_path = '' as $$
declare
  failed uuid[] := maskd.hand_on(parents);
begin
  if cardinality(failed) > 0
     or exists (select from public.segmentation_results r where r.status = 'error' and r.charged > 0 and r.id = any (parents)) then
    perform maskd.give_credits_back(failed || array(select r.id from public.segmentation_results r
      where r.status = 'error' and r.charged > 0 and r.id = any (parents)));
  end if;
end $$;

-- Ends tasks that are not over yet, at once: a worker that is at it finds its claim gone when it settles, and hears of it with its
-- next beat. What no worker had begun is refunded. Returns those that were cancelled.
create or replace function maskd.cancel(ids uuid[]) returns table (id uuid, was text, refunded integer)
language plpgsql set search_path = '' as $$
declare
  live uuid[];
  idle uuid[];
  before jsonb;
begin
  select coalesce(array_agg(t.id), '{}'), coalesce(array_agg(t.id) filter (where t.status <> 'processing'), '{}'),
         coalesce(jsonb_object_agg(t.id, jsonb_build_object('was', t.status, 'charged', t.charged)), '{}')
    into live, idle, before
    from (select r.id, r.status, r.charged from public.segmentation_results r
           where r.id = any (ids) and r.status in ('waiting', 'delayed', 'pending', 'processing') order by r.id for update) t;
  insert into maskd.tombstones (project_id, task_id, claim_token, due_at)
    select r.project_id, r.id, r.claim_token, clock_timestamp() + coalesce(w.lease, interval '30 seconds')
      from public.segmentation_results r left join maskd.workers w on w.id = r.worker_id
     where r.id = any (live) and r.claim_token is not null and r.project_id is not null;
  update public.segmentation_results r
     set status = 'canceled', finished_at = clock_timestamp(), updated_at = now(), worker_id = null, claim_token = null, run_after = null
   where r.id = any (live);
  perform maskd.give_credits_back(idle || maskd.hand_on(live));
  return query select r.id, before -> r.id::text ->> 'was', (before -> r.id::text ->> 'charged')::integer - r.charged::integer
    from public.segmentation_results r where r.id = any (live);
end $$;

-- One task, for its owner or the service.
create or replace function maskd.cancel_own(task uuid) returns jsonb
language plpgsql security definer set search_path = '' as $$
declare
  canceled record;
  ended_as text;
begin
  if not exists (select from public.segmentation_results r join public.projects p on p.id = r.project_id
                  where r.id = task and (p.user_id = (select auth.uid()) or maskd.is_service())) then
    raise exception using errcode = 'PT404', detail = 'task_unknown', message = 'There is no such task among yours.';
  end if;
  select * into canceled from maskd.cancel(array[task]);
  select r.status::text into ended_as from public.segmentation_results r where r.id = task;
  return jsonb_build_object('id', task, 'status', ended_as, 'canceled', canceled.id is not null, 'refunded', coalesce(canceled.refunded, 0));
end $$;

create or replace function public.cancel_segmentation(id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$ select maskd.cancel_own(cancel_segmentation.id) $$;

-- An insert with clearer answers: what is wrong comes back as an HTTP status (PT4xx), a code (details) and a sentence (message), and
-- nothing is stored. It has its caller's rights only; owner, keys, caps and price are the triggers' matter, as for any insert.
create or replace function public.create_segmentation(project_id uuid, kind text default 'segment_concept', source_image_url text default null,
  text_prompt text default null, params jsonb default '{}', after uuid default null, idempotency_key text default null) returns jsonb
language plpgsql volatile security invoker set search_path = '' as $$
#variable_conflict use_variable
declare
  made record;
  repeated boolean := false;
begin
  kind := coalesce(kind, 'segment_concept');
  params := coalesce(params, '{}');
  if (select auth.uid()) is null then
    raise exception using errcode = 'PT401', detail = 'unauthorized', message = 'Sign in first: the request has no user.';
  elsif not exists (select from public.projects p where p.id = project_id and p.user_id = (select auth.uid())) then
    raise exception using errcode = 'PT404', detail = 'project_unknown', message = 'There is no such project among yours.';
  elsif length(idempotency_key) > 200 then
    raise exception using errcode = 'PT400', detail = 'params_invalid', message = 'idempotency_key is longer than 200 characters; send a UUID.';
  end if;
  for turn in 1..3 loop
    select r.id, r.status, r.charged, r.error, r.kind, r.source_image_url, r.text_prompt, r.params, r.after into made
      from public.segmentation_results r where r.project_id = project_id and r.idempotency_key = idempotency_key;
    repeated := found;
    exit when found;
    begin
      insert into public.segmentation_results (project_id, kind, source_image_url, text_prompt, params, after, idempotency_key)
        values (project_id, kind, source_image_url, text_prompt, params, after, idempotency_key)
        returning segmentation_results.id, segmentation_results.status, segmentation_results.charged, segmentation_results.error into made;
      exit;
    exception when unique_violation then  -- the same request was here at the same time: look again
      if idempotency_key is null or turn = 3 then raise; end if;
    end;
  end loop;
  if repeated then
    if made.kind <> kind or made.text_prompt is distinct from text_prompt or made.params <> params or made.after is distinct from after
        or made.source_image_url is distinct from source_image_url and (after is null or coalesce(source_image_url, '') <> '') then
      raise exception using errcode = 'PT409', detail = 'idempotency_conflict',
        message = 'Another task was sent with this idempotency_key; send this one with a key of its own.';
    end if;
  elsif made.status = 'error' then
    raise exception using errcode = 'PT400', detail = made.error ->> 'code', message = made.error ->> 'message';
  end if;
  return jsonb_build_object('id', made.id, 'status', made.status, 'charged', made.charged, 'error', made.error, 'repeated', repeated,
    'credits', (select p.credits from public.users_profile p where p.id = (select auth.uid())));
end $$;

-- Users reach two functions of public and, through one of them, one of maskd; all else is the service's.
grant usage on schema maskd to authenticated;
revoke all on maskd.prices from public, anon, authenticated;
grant select, insert, update, delete on maskd.prices to service_role;
do $$
declare
  f text;
begin
  foreach f in array array['maskd.is_service()', 'maskd.price(text, text)', 'maskd.charge()', 'maskd.give_credits_back(uuid[])',
    'maskd.refund_user(uuid, uuid[], integer[])', 'maskd.refuse_too_many(uuid)', 'maskd.before_insert()', 'maskd.after_delete()', 'maskd.hand_on(uuid[])', 'maskd.promote(uuid[])',
    'maskd.cancel(uuid[])', 'maskd.cancel_own(uuid)', 'public.cancel_segmentation(uuid)',
    'public.create_segmentation(uuid, text, text, text, jsonb, uuid, text)'] loop
    execute format('revoke all on function %s from public, anon, authenticated', f);
    execute format('grant execute on function %s to service_role', f);
  end loop;
end $$;
grant execute on function maskd.cancel_own(uuid), public.cancel_segmentation(uuid),
  public.create_segmentation(uuid, text, text, text, jsonb, uuid, text) to authenticated;

notify pgrst, 'reload schema';

insert into maskd.migrations (version, name) values ('20261121000900', 'credits') on conflict do nothing;
