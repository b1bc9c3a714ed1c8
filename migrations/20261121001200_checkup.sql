-- What `maskd doctor` asks of the database, in one answer, so that it is the same over asyncpg and over RPC: facts only, judged
-- by the daemon. Reads the catalogs, no row of a user.
set lock_timeout = '10s';

-- The transaction of this database that is open for longest, prepared ones too: it holds back vacuum, and so slows every claim.
-- By its owner's rights, since others see of foreign sessions only that they are there; what they run is not told.
create or replace function maskd.oldest_transaction() returns jsonb
language sql volatile security definer set search_path = '' as $$
  select to_jsonb(t) from (
    select a.pid::text as name, a.application_name as application, a.state,
           round(extract(epoch from clock_timestamp() - a.xact_start)::numeric, 1) as seconds
      from pg_catalog.pg_stat_activity a
     where a.datname = current_database() and a.backend_type = 'client backend' and a.xact_start is not null and a.pid <> pg_backend_pid()
    union all
    select p.gid, '', 'prepared', round(extract(epoch from clock_timestamp() - p.prepared)::numeric, 1)
      from pg_catalog.pg_prepared_xacts p where p.database = current_database()
     order by seconds desc limit 1) t
$$;

-- What anon and authenticated may do and should not: whatever shows a claim, forges a result or a credit, or runs the protocol.
-- Columns that an adopted table has of its own are its owner's to grant.
create or replace function maskd.grants_too_many() returns jsonb
language sql stable set search_path = '' as $$
  with tables (name, internal, filled_in, users_own) as (values
    ('users_profile', '{}'::text[], '{tier,credits,created_at}'::text[], '{id}'::text[]),
    ('projects', '{}', '{created_at}', '{id,user_id,name}'),
    ('usage_logs', '{}', '{id,user_id,action,credits_used,created_at}', '{}'),
    ('segmentation_results', '{pending_at,max_attempts,deaths,run_after,fair_rank,worker_id,claim_token}',
     '{user_id,priority,mask_image_url,masks_url,result_image_url,labels,metadata,error,attempts,charged,created_at,started_at,finished_at,updated_at}',
     '{id,project_id,kind,source_image_url,text_prompt,params,status,after,idempotency_key}')),
  there as (
    select t.*, c.oid from tables t join pg_catalog.pg_class c
        on c.relname = t.name and c.relnamespace = to_regnamespace('public') and c.relkind in ('r', 'p')),
  on_columns as (
    select r.role, t.name, a.attname, p.privilege, has_table_privilege(r.role, t.oid, p.privilege) as whole
      from there t
      join pg_catalog.pg_attribute a on a.attrelid = t.oid and a.attname = any (t.internal || t.filled_in || t.users_own)
     cross join (values ('anon'), ('authenticated')) r (role)
     cross join (values ('SELECT'), ('INSERT'), ('UPDATE')) p (privilege)
     where has_column_privilege(r.role, t.oid, a.attnum, p.privilege) and (r.role = 'anon' or case p.privilege
       when 'SELECT' then a.attname = any (t.internal)
       when 'INSERT' then a.attname = any (t.internal || t.filled_in) or t.name = 'users_profile'
       else not (t.name = 'projects' and a.attname = 'name') end)),
  found (role, privilege, object) as (
    select role, privilege, case when bool_and(whole) then '' else string_agg(attname, ', ' order by attname) || ' of ' end || 'public.' || name
      from on_columns group by role, name, privilege
    union all
    select r.role, p.privilege, 'public.' || t.name
      from there t cross join (values ('anon'), ('authenticated')) r (role) cross join (values ('DELETE'), ('TRUNCATE')) p (privilege)
     where has_table_privilege(r.role, t.oid, p.privilege)
       and not (r.role = 'authenticated' and p.privilege = 'DELETE' and t.name in ('segmentation_results', 'projects'))
    union all
    select r.role, p.privilege, 'maskd.' || c.relname
      from pg_catalog.pg_class c
     cross join (values ('anon'), ('authenticated')) r (role)
     cross join (values ('SELECT'), ('INSERT'), ('UPDATE'), ('DELETE'), ('TRUNCATE')) p (privilege)
     where c.relnamespace = to_regnamespace('maskd') and c.relkind in ('r', 'p', 'v', 'm') and has_table_privilege(r.role, c.oid, p.privilege)
    union all
    select r.role, 'EXECUTE', n.nspname || '.' || f.proname
      from pg_catalog.pg_proc f
      join pg_catalog.pg_namespace n on n.oid = f.pronamespace
     cross join (values ('anon'), ('authenticated')) r (role)
     where (n.nspname = 'maskd' or n.nspname = 'public' and (f.proname like 'maskd\_%' or f.proname in ('create_segmentation', 'cancel_segmentation')))
       and has_function_privilege(r.role, f.oid, 'execute')
       -- what users call themselves, and what that calls for them
       and not (r.role = 'authenticated' and f.proname in ('create_segmentation', 'cancel_segmentation', 'cancel_own'))),
  lines (line) as (select role || ' may ' || string_agg(distinct privilege, ', ') || ' ' || object from found group by role, object)
  select coalesce(jsonb_agg(l.line order by l.line), '[]') from lines l
$$;

-- What the service, the caller and users need and lack.
create or replace function maskd.grants_lacking() returns jsonb
language sql stable set search_path = '' as $$
  with workers (role) as (values ('service_role'), (current_user::text)),
  found (role, privilege, object) as (
    select w.role, p.privilege, n.nspname || '.' || c.relname
      from pg_catalog.pg_class c
      join pg_catalog.pg_namespace n on n.oid = c.relnamespace
     cross join workers w cross join (values ('SELECT'), ('INSERT'), ('UPDATE'), ('DELETE')) p (privilege)
     where c.relkind in ('r', 'p')
       and (n.nspname = 'maskd' or n.nspname = 'public' and c.relname in ('users_profile', 'projects', 'usage_logs', 'segmentation_results'))
       and not has_table_privilege(w.role, c.oid, p.privilege)
    union
    select w.role, 'EXECUTE', n.nspname || '.' || f.proname
      from pg_catalog.pg_proc f
      join pg_catalog.pg_namespace n on n.oid = f.pronamespace
     cross join workers w
     where (n.nspname = 'maskd' or n.nspname = 'public' and f.proname like 'maskd\_%') and not has_function_privilege(w.role, f.oid, 'execute')
    union
    select w.role, 'USE', 'the schema maskd' from workers w where not has_schema_privilege(w.role, 'maskd', 'usage')
    union
    select 'service_role', 'BYPASS', 'row-level security' from pg_catalog.pg_roles r where r.rolname = 'service_role' and not r.rolbypassrls
    union
    select 'authenticated', p.privilege, p.name || ' of public.segmentation_results'
      from (values ('INSERT', 'project_id'), ('INSERT', 'kind'), ('INSERT', 'source_image_url'), ('INSERT', 'text_prompt'), ('INSERT', 'params'),
                   ('SELECT', 'id'), ('SELECT', 'status'), ('SELECT', 'error'), ('SELECT', 'labels'), ('SELECT', 'masks_url')) p (privilege, name)
     where not has_column_privilege('authenticated', 'public.segmentation_results', p.name, p.privilege)),
  lines (line) as (select role || ' may not ' || string_agg(distinct privilege, ', ') || ' ' || object from found group by role, object)
  select coalesce(jsonb_agg(l.line order by l.line), '[]') from lines l
$$;

create or replace function maskd.checkup() returns jsonb
language sql volatile set search_path = '' as $$
  with ours as (
    select c.oid, c.relname, c.relrowsecurity, c.reloptions, n.nspname
      from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
     where c.relkind in ('r', 'p')
       and (n.nspname = 'maskd' or n.nspname = 'public' and c.relname in ('users_profile', 'projects', 'usage_logs', 'segmentation_results'))),
  queue as (select o.* from ours o where o.nspname = 'public' and o.relname = 'segmentation_results')
  select jsonb_build_object(
    'now', extract(epoch from clock_timestamp()),
    'server', current_setting('server_version'),
    'versions', (select coalesce(jsonb_agg(m.version order by m.version), '[]') from maskd.migrations m),
    'grants_too_many', maskd.grants_too_many(),
    'grants_lacking', maskd.grants_lacking(),
    'publication', (select coalesce((select p.puballtables or exists (select from pg_catalog.pg_publication_tables t
          where t.pubname = p.pubname and t.schemaname = 'public' and t.tablename = 'segmentation_results')
        from pg_catalog.pg_publication p where p.pubname = 'supabase_realtime'), false)),
    'primary_key', (select coalesce((select array_agg(a.attname::text) = '{id}' from queue q
        join pg_catalog.pg_index i on i.indrelid = q.oid and i.indisprimary and i.indisvalid
        join pg_catalog.pg_attribute a on a.attrelid = q.oid and a.attnum = any (i.indkey)), false)),
    'triggers', (select coalesce(jsonb_object_agg(t.tgname, t.tgenabled in ('O', 'A')), '{}')
        from pg_catalog.pg_trigger t join ours o on o.oid = t.tgrelid where not t.tgisinternal),
    'indexes', (select coalesce(jsonb_object_agg(x.relname, i.indisvalid and i.indisready), '{}')
        from pg_catalog.pg_index i join ours o on o.oid = i.indrelid join pg_catalog.pg_class x on x.oid = i.indexrelid),
    'row_security', (select jsonb_object_agg(o.relname, o.relrowsecurity) from ours o where o.nspname = 'public'),
    'policies', (select coalesce(jsonb_object_agg(o.relname || '.' || p.polname, p.polpermissive), '{}')
        from pg_catalog.pg_policy p join ours o on o.oid = p.polrelid where o.nspname = 'public'),
    'vacuum', (select jsonb_build_object('on', current_setting('autovacuum')::boolean and not coalesce(q.reloptions @> '{autovacuum_enabled=false}', false),
        'live', pg_catalog.pg_stat_get_live_tuples(q.oid), 'dead', pg_catalog.pg_stat_get_dead_tuples(q.oid)) from queue q),
    'sees_transactions', (select pg_has_role(f.proowner, 'pg_read_all_stats', 'usage') from pg_catalog.pg_proc f
        where f.oid = 'maskd.oldest_transaction()'::regprocedure),
    'oldest_transaction', maskd.oldest_transaction())
$$;

create or replace function public.maskd_checkup() returns jsonb
language sql volatile security invoker set search_path = '' as $$ select maskd.checkup() $$;

-- Old projects let every role execute every new function: revoked by name, granted to the service alone.
do $$
declare
  f text;
begin
  foreach f in array array['maskd.oldest_transaction()', 'maskd.grants_too_many()', 'maskd.grants_lacking()', 'maskd.checkup()', 'public.maskd_checkup()']
  loop
    execute format('revoke all on function %s from public, anon, authenticated', f);
    execute format('grant execute on function %s to service_role', f);
  end loop;
end $$;

notify pgrst, 'reload schema';

insert into maskd.migrations (version, name) values ('20261121001200', 'checkup') on conflict do nothing;
