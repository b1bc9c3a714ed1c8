-- The kinds that paint over, fill and replace; the last two by a generator, whose every step costs as much as an image elsewhere.
-- And chains hand on their images: a task that names no image takes the one that the task before it left.
set lock_timeout = '10s';

insert into maskd.kinds (kind, cost) values ('remove_object', 2), ('fill_object', 10), ('replace_background', 4)
on conflict (kind) do nothing;

-- What a finished task hands on: the image that it made, else the one that it looked at.
create or replace function maskd.image_after(parent uuid) returns text
language sql stable set search_path = '' as $$
  select coalesce(nullif(p.result_image_url, ''), p.source_image_url)::text
    from public.segmentation_results p where p.id = parent and p.status = 'done'
$$;

-- After tasks have ended: those that waited for them begin, or fail with them, recursively.
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
         source_image_url = coalesce(nullif(c.source_image_url, ''), maskd.image_after(p.id)),
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

-- The same for a task that is inserted when the one before it is done already; runs after maskd_before_insert, by its name.
create or replace function maskd.before_insert_image() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  new.source_image_url := maskd.image_after(new.after);
  return new;
end $$;
drop trigger if exists maskd_before_insert_image on public.segmentation_results;
create trigger maskd_before_insert_image before insert on public.segmentation_results
  for each row when (new.after is not null and coalesce(new.source_image_url, '') = '' and new.status = 'pending')
  execute function maskd.before_insert_image();

-- As before, and a failed task whose parent is done by now takes that one's image.
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
         source_image_url = coalesce(nullif(r.source_image_url, ''), maskd.image_after(r.after)),
         fair_rank = maskd.rank(r.kind::text, coalesce(r.priority, 0)::smallint, r.user_id)
    from chosen where r.id = chosen.id;
  get diagnostics changed = row_count;
  if changed > 0 then
    perform pg_notify('maskd', '');
  end if;
  return changed;
end $$;

do $$
declare
  f text;
begin
  foreach f in array array['maskd.image_after(uuid)', 'maskd.promote(uuid[])', 'maskd.before_insert_image()',
                           'maskd.retry(uuid[], text, integer)'] loop
    execute format('revoke all on function %s from public, anon, authenticated', f);
    execute format('grant execute on function %s to service_role', f);
  end loop;
end $$;

insert into maskd.migrations (version, name) values ('20261121000700', 'inpaint') on conflict do nothing;
