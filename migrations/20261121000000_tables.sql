-- Tables, indexes, row-level security and grants. Creates what is missing and adds missing columns, so that a project
-- which already has the four tables can adopt maskd. Old rows are not touched.
set lock_timeout = '10s';

do $$
declare
  wrong text;
begin
  if to_regclass('auth.users') is null or to_regprocedure('auth.uid()') is null
     or (select count(*) from pg_roles where rolname in ('anon', 'authenticated', 'service_role')) < 3 then
    raise exception 'maskd needs what Supabase has (auth.users, auth.uid() and the roles anon, authenticated, service_role); on a plain Postgres run: maskd migrate --plain';
  end if;
  select string_agg(format('public.%s.%s is %s (%s is needed)', c.table_name, c.column_name,
                           case when c.data_type = 'USER-DEFINED' then c.udt_name else c.data_type end, w.needed),
                    ', ' order by c.table_name, c.ordinal_position) into wrong
    from (values
      ('users_profile', 'uuid', '{id}'), ('users_profile', 'text', '{tier}'), ('users_profile', 'integer', '{credits}'),
      ('users_profile', 'timestamptz', '{created_at}'),
      ('projects', 'uuid', '{id,user_id}'), ('projects', 'text', '{name}'), ('projects', 'timestamptz', '{created_at}'),
      ('usage_logs', 'uuid', '{user_id}'), ('usage_logs', 'text', '{action}'), ('usage_logs', 'integer', '{credits_used}'),
      ('usage_logs', 'timestamptz', '{created_at}'),
      ('segmentation_results', 'uuid', '{id,project_id,user_id,after,worker_id,claim_token}'),
      ('segmentation_results', 'text', '{kind,source_image_url,text_prompt,mask_image_url,masks_url,result_image_url,idempotency_key}'),
      ('segmentation_results', 'text or an enum', '{status}'),
      ('segmentation_results', 'jsonb', '{params,labels,metadata,error}'),
      ('segmentation_results', 'integer', '{priority,attempts,max_attempts,deaths,charged}'),
      ('segmentation_results', 'double precision', '{fair_rank}'),
      ('segmentation_results', 'timestamptz', '{run_after,created_at,pending_at,started_at,finished_at,updated_at}')
    ) w (table_name, needed, columns)
    join information_schema.columns c
      on c.table_schema = 'public' and c.table_name = w.table_name and c.column_name = any (w.columns::text[])
   where not case w.needed
     when 'text' then c.data_type in ('text', 'character varying')
     when 'text or an enum' then c.data_type in ('text', 'character varying')
       or exists (select from pg_type y join pg_namespace n on n.oid = y.typnamespace
                   where y.typtype = 'e' and y.typname = c.udt_name and n.nspname = c.udt_schema)
     when 'integer' then c.data_type in ('smallint', 'integer', 'bigint')
     when 'timestamptz' then c.data_type = 'timestamp with time zone'
     else c.data_type = w.needed end;
  if wrong is not null then
    raise exception 'maskd cannot adopt these tables: %; rename the old tables or convert the columns first', wrong;
  end if;
  -- What stands on an enum's values stops `alter type`, or would mean something else after it.
  select string_agg(distinct pg_describe_object(d.classid, d.objid, d.objsubid), ', ') into wrong
    from pg_attribute a
    join pg_type y on y.oid = a.atttypid and y.typtype = 'e'
    join pg_depend d on d.refclassid = 'pg_class'::regclass and d.refobjid = a.attrelid and d.refobjsubid = a.attnum
   where a.attrelid = to_regclass('public.segmentation_results') and a.attname = 'status'
     and (d.classid in ('pg_rewrite'::regclass, 'pg_policy'::regclass, 'pg_trigger'::regclass, 'pg_proc'::regclass)
       or exists (select from pg_index i where d.classid = 'pg_class'::regclass and i.indexrelid = d.objid
                   and (i.indpred is not null or i.indexprs is not null)));
  if wrong is not null then
    raise exception 'maskd cannot adopt public.segmentation_results: its enum status becomes text, which these stand on: %; drop them first and make them again afterwards, with status as text', wrong;
  end if;
  select string_agg(format('public.segmentation_results.%s', c.column_name), ', ' order by c.ordinal_position) into wrong
    from information_schema.columns c
   where c.table_schema = 'public' and c.table_name = 'segmentation_results' and c.is_nullable = 'NO'
     and c.column_default is null and c.is_identity = 'NO' and c.is_generated = 'NEVER'
     and c.column_name not in ('id', 'project_id', 'user_id', 'kind', 'source_image_url', 'text_prompt', 'params', 'priority',
       'status', 'after', 'mask_image_url', 'masks_url', 'result_image_url', 'labels', 'metadata', 'error', 'attempts',
       'max_attempts', 'deaths', 'run_after', 'fair_rank', 'worker_id', 'claim_token', 'charged', 'idempotency_key',
       'created_at', 'pending_at', 'started_at', 'finished_at', 'updated_at');
  if wrong is not null then
    raise exception 'maskd cannot adopt these tables: % may not be null and has no default, and a task is inserted without it; give it a default or let it be null first', wrong;
  end if;
end $$;

create schema if not exists maskd;
revoke all on schema maskd from public, anon, authenticated;
grant usage on schema maskd to service_role;

create table if not exists maskd.migrations (
  version text primary key,
  name text not null,
  applied_at timestamptz not null default now()
);

create table if not exists maskd.settings (key text primary key, value jsonb not null);
insert into maskd.settings (key, value) values
  ('key_templates', '["uploads/{user_id}/", "masks/{project_id}/"]'),
  ('url_prefixes', '[]'),
  ('priorities', '{"free": 0, "basic": 5, "pro": 10, "enterprise": 20}'),
  ('active_rows_max', '1000')
on conflict (key) do nothing;

create table if not exists maskd.kinds (
  kind text primary key,
  cost real not null default 1,
  paused boolean not null default false,
  served_at timestamptz
);
insert into maskd.kinds (kind, cost) values ('segment_visual', 1), ('segment_everything', 4) on conflict (kind) do nothing;

create table if not exists maskd.workers (
  id uuid primary key,
  beat_at timestamptz not null,
  steady_since timestamptz not null,
  lease interval not null,
  info jsonb not null default '{}',
  kinds text[] not null default '{}',
  begun uuid[] not null default '{}'
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

-- Blobs that nobody needs any more: those of a claim that was taken away, or (claim_token null) all of a deleted task.
create table if not exists maskd.tombstones (
  id bigint generated always as identity primary key,
  project_id uuid not null,
  task_id uuid not null,
  claim_token uuid,
  due_at timestamptz not null
);
create index if not exists tombstones_due on maskd.tombstones (due_at);

create table if not exists public.users_profile (id uuid primary key references auth.users (id) on delete cascade);
alter table public.users_profile
  add column if not exists tier text not null default 'free',
  add column if not exists credits integer not null default 0,
  add column if not exists created_at timestamptz not null default now();

create table if not exists public.projects (id uuid primary key default gen_random_uuid());
alter table public.projects
  add column if not exists user_id uuid not null references auth.users (id) on delete cascade,
  add column if not exists name text not null default '',
  add column if not exists created_at timestamptz not null default now();
create index if not exists projects_user on public.projects (user_id);

create table if not exists public.usage_logs (id uuid primary key default gen_random_uuid());
alter table public.usage_logs
  add column if not exists user_id uuid references auth.users (id) on delete cascade,
  add column if not exists action text not null default '',
  add column if not exists credits_used integer not null default 0,
  add column if not exists created_at timestamptz not null default now();
create index if not exists usage_logs_user on public.usage_logs (user_id, created_at desc);

create table if not exists public.segmentation_results (id uuid primary key default gen_random_uuid());
alter table public.segmentation_results
  add column if not exists project_id uuid references public.projects (id) on delete cascade,
  add column if not exists user_id uuid,
  add column if not exists kind text not null default 'segment_concept',
  add column if not exists source_image_url text,
  add column if not exists text_prompt text,
  add column if not exists params jsonb not null default '{}',
  add column if not exists priority smallint,
  add column if not exists status text not null default 'pending',
  add column if not exists after uuid,
  add column if not exists mask_image_url text,
  add column if not exists masks_url text,
  add column if not exists result_image_url text,
  add column if not exists labels jsonb,
  add column if not exists metadata jsonb,
  add column if not exists error jsonb,
  add column if not exists attempts integer not null default 0,
  add column if not exists max_attempts integer not null default 3,
  add column if not exists deaths integer not null default 0,
  add column if not exists run_after timestamptz,
  add column if not exists fair_rank double precision not null default 0,
  add column if not exists worker_id uuid,
  add column if not exists claim_token uuid,
  add column if not exists charged integer not null default 0,
  add column if not exists idempotency_key text,
  add column if not exists created_at timestamptz not null default now(),
  add column if not exists pending_at timestamptz,
  add column if not exists started_at timestamptz,
  add column if not exists finished_at timestamptz,
  add column if not exists updated_at timestamptz not null default now();

-- An adopted table may keep its status as an enum or under a check of its own, and demand what a task may lack.
do $$
declare
  found record;
begin
  for found in
    select conname from pg_constraint
     where conrelid = 'public.segmentation_results'::regclass and contype = 'c' and conname <> 'segmentation_results_status_known'
       and pg_get_constraintdef(oid) ~ '\mstatus\M'
  loop
    execute format('alter table public.segmentation_results drop constraint %I', found.conname);
  end loop;
  if (select data_type from information_schema.columns where table_schema = 'public'
        and table_name = 'segmentation_results' and column_name = 'status') not in ('text', 'character varying') then
    alter table public.segmentation_results alter column status drop default;
    alter table public.segmentation_results alter column status type text using status::text;
    alter table public.segmentation_results alter column status set default 'pending';
  end if;
  for found in
    select column_name from information_schema.columns
     where table_schema = 'public' and table_name = 'segmentation_results' and is_nullable = 'NO'
       and column_name in ('source_image_url', 'text_prompt', 'after', 'mask_image_url', 'masks_url', 'result_image_url', 'labels',
         'metadata', 'error', 'run_after', 'worker_id', 'claim_token', 'idempotency_key', 'pending_at', 'started_at', 'finished_at')
  loop
    execute format('alter table public.segmentation_results alter column %I drop not null', found.column_name);
  end loop;
  if not exists (select from pg_constraint where conname = 'segmentation_results_status_known') then
    alter table public.segmentation_results add constraint segmentation_results_status_known check (status in
      ('waiting', 'delayed', 'pending', 'processing', 'done', 'error', 'canceled')) not valid;
  end if;
end $$;

-- Claimable rows only; one death puts a row into the index of suspects, which run apart.
create index if not exists segmentation_results_claim on public.segmentation_results
  (kind, priority desc, fair_rank, id) where status = 'pending' and deaths = 0;
create index if not exists segmentation_results_suspect on public.segmentation_results
  (kind, deaths, fair_rank, id) where status in ('pending', 'processing') and deaths > 0;
create index if not exists segmentation_results_rank on public.segmentation_results
  (user_id, kind, fair_rank desc) where status = 'pending';
create index if not exists segmentation_results_image on public.segmentation_results
  (kind, user_id, source_image_url, fair_rank) where status = 'pending' and deaths = 0 and source_image_url is not null;
create index if not exists segmentation_results_held on public.segmentation_results
  (worker_id, claim_token) where status = 'processing';
create index if not exists segmentation_results_delayed on public.segmentation_results (run_after) where status = 'delayed';
create index if not exists segmentation_results_waiting on public.segmentation_results (after) where status = 'waiting';
create index if not exists segmentation_results_failed on public.segmentation_results (finished_at desc) where status = 'error';
create index if not exists segmentation_results_project on public.segmentation_results (project_id, created_at desc);
create unique index if not exists segmentation_results_idempotency on public.segmentation_results
  (project_id, idempotency_key) where idempotency_key is not null;

-- Every task writes its row twice, so dead rows come fast.
alter table public.segmentation_results set (
  autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0,
  autovacuum_analyze_scale_factor = 0.05, autovacuum_analyze_threshold = 1000);

alter table public.users_profile enable row level security;
alter table public.projects enable row level security;
alter table public.usage_logs enable row level security;
alter table public.segmentation_results enable row level security;

-- Policies of ours have our names. Permissive ones are ORed with whatever older ones an adopted table has, so restrictive
-- ones hold all of them to own rows; who must see more than that (staff, jobs) comes as service_role.
do $$
declare
  held record;
begin
  drop policy if exists maskd_own_profile on public.users_profile;
  create policy maskd_own_profile on public.users_profile for select to authenticated using (id = (select auth.uid()));
  drop policy if exists maskd_own_usage on public.usage_logs;
  create policy maskd_own_usage on public.usage_logs for select to authenticated using (user_id = (select auth.uid()));
  drop policy if exists maskd_own_projects on public.projects;
  create policy maskd_own_projects on public.projects for all to authenticated
    using (user_id = (select auth.uid())) with check (user_id = (select auth.uid()));
  drop policy if exists maskd_own_results_read on public.segmentation_results;
  create policy maskd_own_results_read on public.segmentation_results for select to authenticated
    using (project_id in (select id from public.projects where user_id = (select auth.uid())));
  drop policy if exists maskd_own_results_add on public.segmentation_results;
  create policy maskd_own_results_add on public.segmentation_results for insert to authenticated
    with check (project_id in (select id from public.projects where user_id = (select auth.uid())));
  drop policy if exists maskd_own_results_delete on public.segmentation_results;
  create policy maskd_own_results_delete on public.segmentation_results for delete to authenticated
    using (project_id in (select id from public.projects where user_id = (select auth.uid())));
  for held in
    select * from (values
      ('users_profile', 'id = (select auth.uid())'),
      ('projects', 'user_id = (select auth.uid())'),
      ('usage_logs', 'user_id = (select auth.uid())'),
      ('segmentation_results', 'project_id in (select id from public.projects where user_id = (select auth.uid()))')) h (name, own)
  loop
    execute format('drop policy if exists maskd_only_own on public.%I', held.name);
    execute format('create policy maskd_only_own on public.%I as restrictive for all to authenticated using (%s) with check (%2$s)',
      held.name, held.own);
    execute format('drop policy if exists maskd_not_anon on public.%I', held.name);
    execute format('create policy maskd_not_anon on public.%I as restrictive for all to anon using (false)', held.name);
  end loop;
end $$;

-- Revoked by name: old projects granted everything to these roles, new ones grant nothing. A revoke on the table also
-- takes column grants away; an adopted project's own extra columns must be granted again by their owner.
revoke all on public.users_profile, public.projects, public.usage_logs, public.segmentation_results from public, anon, authenticated;
grant select on public.users_profile, public.usage_logs to authenticated;
grant select, delete, insert (id, user_id, name), update (name) on public.projects to authenticated;
grant select (id, project_id, user_id, kind, source_image_url, text_prompt, params, priority, status, after, mask_image_url,
  masks_url, result_image_url, labels, metadata, error, attempts, charged, idempotency_key, created_at, started_at, finished_at,
  updated_at), insert (id, project_id, kind, source_image_url, text_prompt, params, after, idempotency_key, status), delete
  on public.segmentation_results to authenticated;
grant all on public.users_profile, public.projects, public.usage_logs, public.segmentation_results to service_role;
revoke all on all tables in schema maskd from public, anon, authenticated;
grant select, insert, update, delete on all tables in schema maskd to service_role;

do $$
begin
  if exists (select from pg_publication where pubname = 'supabase_realtime' and not puballtables)
     and not exists (select from pg_publication_tables where pubname = 'supabase_realtime'
                      and schemaname = 'public' and tablename = 'segmentation_results') then
    alter publication supabase_realtime add table public.segmentation_results;
  end if;
end $$;

insert into maskd.migrations (version, name) values ('20261121000000', 'tables') on conflict do nothing;
