-- The queue's protocol for callers over HTTP: one function of public for each of maskd that a worker calls, with one jsonb as its
-- answer, since PostgREST cuts sets off at its row limit. Executable by the service alone.
set lock_timeout = '10s';

-- What a claim brought: tasks in the order to run them, when the next delayed row is due, whether suspects wait.
create or replace function public.maskd_claim(worker uuid, token uuid, kinds text[], most integer) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select jsonb_build_object(
      'tasks', coalesce(jsonb_agg(to_jsonb(c) order by coalesce(c.priority, 0) desc, coalesce(c.fair_rank, 0))
                        filter (where c.id is not null), '[]'),
      'next_due_seconds', max(c.next_due_seconds), 'suspects', coalesce(bool_or(c.suspects), false))
    from maskd.claim(worker, token, kinds, most) c
$$;

create or replace function public.maskd_claim_suspects(worker uuid, token uuid, kinds text[], most integer) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select jsonb_build_object(
      'tasks', coalesce(jsonb_agg(to_jsonb(c) order by coalesce(c.priority, 0) desc, coalesce(c.fair_rank, 0)), '[]'),
      'next_due_seconds', null, 'suspects', false)
    from maskd.claim_suspects(worker, token, kinds, most) c
$$;

-- [{id, token, verdict}] of what was not written.
create or replace function public.maskd_settle(outcomes jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select coalesce(jsonb_agg(to_jsonb(s)), '[]') from maskd.settle(outcomes) s
$$;

-- [{id, token}] of the claims that are gone.
create or replace function public.maskd_beat(worker uuid, lease_seconds double precision, info jsonb, kinds text[],
  held_ids uuid[], held_tokens uuid[], begun_ids uuid[], open_tokens uuid[]) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select coalesce(jsonb_agg(to_jsonb(b)), '[]')
    from maskd.beat(worker, lease_seconds, info, kinds, held_ids, held_tokens, begun_ids, open_tokens) b
$$;

create or replace function public.maskd_rescue(worker uuid, unserved_seconds double precision) returns jsonb
language sql volatile security invoker set search_path = '' as $$ select to_jsonb(maskd.rescue(worker, unserved_seconds)) $$;

create or replace function public.maskd_bury(worker uuid, begun_ids uuid[]) returns jsonb
language sql volatile security invoker set search_path = '' as $$ select to_jsonb(maskd.bury(worker, begun_ids)) $$;

create or replace function public.maskd_leave(worker uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select maskd.leave(worker);
  select 'true'::jsonb
$$;

create or replace function public.maskd_due_tombstones(most integer) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select coalesce(jsonb_agg(to_jsonb(t)), '[]') from maskd.due_tombstones(most) t
$$;

create or replace function public.maskd_bury_tombstones(ids bigint[]) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select maskd.bury_tombstones(ids);
  select 'true'::jsonb
$$;

create or replace function public.maskd_masks_of(task uuid, project uuid) returns jsonb
language sql stable security invoker set search_path = '' as $$ select to_jsonb(maskd.masks_of(task, project)) $$;

create or replace function public.maskd_owner_of(project uuid) returns jsonb
language sql stable security invoker set search_path = '' as $$
  select to_jsonb(p.user_id) from public.projects p where p.id = project
$$;

create or replace function public.maskd_key_templates() returns jsonb
language sql stable security invoker set search_path = '' as $$
  select coalesce((select s.value from maskd.settings s where s.key = 'key_templates'), '[]')
$$;

create or replace function public.maskd_status() returns jsonb
language sql volatile security invoker set search_path = '' as $$ select maskd.status() $$;

-- Versions of all migrations that have run.
create or replace function public.maskd_versions() returns jsonb
language sql stable security invoker set search_path = '' as $$
  select coalesce(jsonb_agg(m.version order by m.version), '[]') from maskd.migrations m
$$;

-- Old projects let every role execute every new function: revoked by name, granted to the service alone.
do $$
declare
  f text;
begin
  foreach f in array array['maskd_claim(uuid, uuid, text[], integer)', 'maskd_claim_suspects(uuid, uuid, text[], integer)',
    'maskd_settle(jsonb)', 'maskd_beat(uuid, double precision, jsonb, text[], uuid[], uuid[], uuid[], uuid[])',
    'maskd_rescue(uuid, double precision)', 'maskd_bury(uuid, uuid[])', 'maskd_leave(uuid)', 'maskd_due_tombstones(integer)',
    'maskd_bury_tombstones(bigint[])', 'maskd_masks_of(uuid, uuid)', 'maskd_owner_of(uuid)', 'maskd_key_templates()', 'maskd_status()', 'maskd_versions()']
  loop
    execute format('revoke all on function public.%s from public, anon, authenticated', f);
    execute format('grant execute on function public.%s to service_role', f);
  end loop;
end $$;

-- PostgREST knows the functions from when it last looked; nobody listens on a plain Postgres.
notify pgrst, 'reload schema';

insert into maskd.migrations (version, name) values ('20261121000800', 'rpc') on conflict do nothing;
