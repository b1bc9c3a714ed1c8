-- How a row comes in: owner, keys, priority, fair rank, status; decided by triggers, so that a plain insert is enough and
-- nothing can be forged. A wish that can never be granted is stored as `error` with a code and a sentence.
set lock_timeout = '10s';

-- The key that an address in a row means, or null when it is none of ours. Which host and bucket are ours only the worker
-- knows for certain (it checks again); here an address must at least lead to an allowed prefix.
create or replace function maskd.key_of(address text, prefixes text[]) returns text
language plpgsql stable set search_path = '' as $$
declare
  path text := address;
  own text;
begin
  if address ~* '^https?://' or starts_with(address, 's3://') then
    path := regexp_replace(address, '[?#].*$', '');
    select rtrim(u.prefix, '/') || '/' into own
      from maskd.settings s cross join lateral jsonb_array_elements_text(s.value) with ordinality u (prefix, place)
     where s.key = 'url_prefixes' and starts_with(path, rtrim(u.prefix, '/') || '/') order by u.place limit 1;
    path := case when own is null then regexp_replace(path, '^[A-Za-z0-9]+://[^/]+/', '') else substr(path, length(own) + 1) end;
    if length(path) > 16384 or path ~ '%(?![0-9A-Fa-f]{2})' then
      return null;
    end if;
    if position('%' in path) > 0 then  -- decoded once, byte by byte: what was encoded twice keeps a % and is refused
      begin
        select convert_from(string_agg(case when starts_with(m.part[1], '%') then decode(replace(m.part[1], '%', ''), 'hex')
                                            else convert_to(m.part[1], 'utf8') end, '' order by m.place), 'utf8') into path
          from regexp_matches(path, '(?:%[0-9A-Fa-f]{2})+|[^%]+', 'g') with ordinality m (part, place);
      exception when character_not_in_repertoire or untranslatable_character then
        return null;
      end;
    end if;
  end if;
  if path ~ '(^|/)\.\.?(/|$)' or path ~ '[%\\\u0001-\u001f\u007f]' or path like '/%' or path like '%//%' then
    return null;
  end if;
  if path is distinct from address and own is null then
    path := substr(path, (select min(position('/' || p in '/' || path)) from unnest(prefixes) p
                           where position('/' || p in '/' || path) > 0));
  end if;
  if length(path) > 1024 or not exists (select from unnest(prefixes) p where starts_with(path, p) and length(path) > length(p)) then
    return null;
  end if;
  return path;
end $$;

-- The prefixes under which a task of this owner and project may name keys.
create or replace function maskd.prefixes(owner uuid, project uuid) returns text[]
language sql stable set search_path = '' as $$
  select array_agg(replace(replace(t, '{user_id}', coalesce(owner::text, '-')), '{project_id}', project::text))
    from maskd.settings s cross join lateral jsonb_array_elements_text(s.value) t where s.key = 'key_templates'
$$;

-- Fair rank (start-time fair queueing): a user's first row joins just behind the head of the kind, the next ones a cost apart, so
-- ten thousand rows of one user never hold up another user's one, also after an outage. Index look-ups only.
create or replace function maskd.rank(row_kind text, row_priority smallint, owner uuid) returns double precision
language sql volatile set search_path = '' as $$
  select greatest(
    least(
      extract(epoch from clock_timestamp())::float8,
      (select r.fair_rank + 0.001 from public.segmentation_results r
        where r.kind = row_kind and r.priority = row_priority and r.status = 'pending' and r.deaths = 0
        order by r.priority desc, r.fair_rank, r.id limit 1)),
    (select r.fair_rank from public.segmentation_results r
      where r.user_id = owner and r.kind = row_kind and r.status = 'pending'
      order by r.fair_rank desc limit 1)
      + (select k.cost from maskd.kinds k where k.kind = row_kind))
$$;

-- Why a new row can never be worked on ({code, message}), or null.
create or replace function maskd.refusal(r public.segmentation_results) returns jsonb
language plpgsql stable set search_path = '' as $$
declare
  prefixes text[] := maskd.prefixes(r.user_id, r.project_id);
  address text;
begin
  if r.project_id is null then
    return jsonb_build_object('code', 'params_invalid', 'message', 'project_id is missing; name the project that the task belongs to.');
  end if;
  if not exists (select from maskd.kinds k where k.kind = r.kind) then
    return jsonb_build_object('code', 'kind_unknown', 'message', format('There is no kind "%s"; known are: %s.', left(r.kind, 60),
      (select string_agg(k.kind, ', ' order by k.kind) from maskd.kinds k)));
  end if;
  if octet_length(r.params::text) > 65536 then
    return jsonb_build_object('code', 'params_invalid', 'message', 'params is larger than 64 KB; send fewer points or masks.');
  end if;
  if jsonb_typeof(r.params) <> 'object' then
    return jsonb_build_object('code', 'params_invalid', 'message', 'params must be a JSON object.');
  end if;
  if length(r.text_prompt) > 1000 then
    return jsonb_build_object('code', 'params_invalid', 'message', 'text_prompt is longer than 1,000 characters; shorten it.');
  end if;
  for address in
    select r.source_image_url where r.source_image_url <> ''
    union all select a #>> '{}' from jsonb_path_query(r.params, 'lax $.**.image_url') a where r.params <> '{}'
    union all select a #>> '{}' from jsonb_path_query(r.params, 'lax $.**.background_image_url') a where r.params <> '{}'
  loop
    if maskd.key_of(address, prefixes) is null then
      return jsonb_build_object('code', 'image_url_forbidden', 'message', format(
        'The address "%s" is not an image of this project; use a key under %s.', left(address, 200), array_to_string(prefixes, ' or ')));
    end if;
  end loop;
  return null;
end $$;

-- The status a new row starts with; a task that waits for another reads it FOR SHARE, so that the other cannot end meanwhile.
create or replace function maskd.after_status(parent uuid, project uuid) returns text
language plpgsql volatile set search_path = '' as $$
declare
  parent_status text;
begin
  select p.status into parent_status from public.segmentation_results p
   where p.id = parent and p.project_id = project for share;
  return case when parent_status = 'done' then 'pending'
              when parent_status in ('waiting', 'delayed', 'pending', 'processing') then 'waiting'
              else 'error' end;
end $$;

create or replace function maskd.before_insert() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  by_user boolean := coalesce(current_setting('role', true), 'none') in ('anon', 'authenticated')
                     or session_user in ('anon', 'authenticated');
  tier text;
begin
  if not by_user and new.status in ('done', 'error', 'canceled') then
    return new;  -- a trusted import of finished rows
  end if;
  select p.user_id, u.tier into new.user_id, tier
    from public.projects p left join public.users_profile u on u.id = p.user_id where p.id = new.project_id;
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
    new.text_prompt := left(new.text_prompt, 1000);
  elsif new.status = 'pending' then
    new.pending_at := clock_timestamp();
    new.fair_rank := maskd.rank(new.kind::text, new.priority::smallint, new.user_id);
  end if;
  return new;
end $$;

-- One user cannot fill the queue: PT429 becomes HTTP 429 behind PostgREST.
create or replace function maskd.refuse_too_many(owner uuid) returns void
language plpgsql stable set search_path = '' as $$
declare
  most integer := (select (s.value #>> '{}')::integer from maskd.settings s where s.key = 'active_rows_max');
  active integer;
begin
  select count(*) into active from (
    select from public.segmentation_results r where r.user_id = owner and r.status = 'pending' limit most) few;
  if active >= most then
    raise exception using errcode = 'PT429', message = format('There are already %s tasks waiting; try again when some are done.', active);
  end if;
end $$;

create or replace function maskd.after_insert() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  perform pg_notify('maskd', '');
  return null;
end $$;

-- The blobs of a deleted task are nobody's any more, and what waits for it waits in vain.
create or replace function maskd.after_delete() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if old.claim_token is not null and old.project_id is not null then  -- earlier attempts have tombstones of their own
    insert into maskd.tombstones (project_id, task_id, claim_token, due_at)
      values (old.project_id, old.id, old.claim_token, now() + interval '5 minutes');
  end if;
  perform maskd.promote(array[old.id]);
  return null;
end $$;

create or replace function maskd.keep_owner() returns trigger language plpgsql set search_path = '' as $$
begin
  raise exception 'projects.user_id cannot be changed: the keys of its tasks lie under the owner''s prefix';
end $$;

drop trigger if exists maskd_before_insert on public.segmentation_results;
create trigger maskd_before_insert before insert on public.segmentation_results
  for each row execute function maskd.before_insert();
drop trigger if exists maskd_after_insert on public.segmentation_results;
create trigger maskd_after_insert after insert on public.segmentation_results
  for each statement execute function maskd.after_insert();
drop trigger if exists maskd_after_delete on public.segmentation_results;
create trigger maskd_after_delete after delete on public.segmentation_results
  for each row execute function maskd.after_delete();
drop trigger if exists maskd_keep_owner on public.projects;
create trigger maskd_keep_owner before update of user_id on public.projects
  for each row when (old.user_id is distinct from new.user_id) execute function maskd.keep_owner();

insert into maskd.migrations (version, name) values ('20261121000100', 'intake') on conflict do nothing;
