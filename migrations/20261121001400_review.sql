-- Types are looked up in a session's temporary schema first, unless the search path names that schema elsewhere: with an empty path
-- whoever may send SQL of their own could lay a domain `text` in the way, whose check ran with the rights of these functions' owner.
set lock_timeout = '10s';

do $$
declare
  f regprocedure;
begin
  for f in select p.oid from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
            where n.nspname = 'maskd'
               or n.nspname = 'public' and (p.proname like 'maskd\_%' or p.proname in ('create_segmentation', 'cancel_segmentation')) loop
    execute format('alter function %s set search_path = pg_catalog, pg_temp', f);
  end loop;
end $$;

insert into maskd.migrations (version, name) values ('20261121001400', 'review') on conflict do nothing;
