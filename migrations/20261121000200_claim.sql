-- How a task is taken. A claim is named by a token that the caller makes: asking again with the same token gives the same rows.
set lock_timeout = '10s';

do $$
begin
  if to_regtype('maskd.claimed') is null then
    create type maskd.claimed as (
      id text, kind text, project_id text, user_id text, source_image_url text, text_prompt text, params text,
      attempts integer, max_attempts integer, deaths integer, waited_seconds double precision,
      priority smallint, fair_rank double precision, next_due_seconds double precision, suspects boolean);
  end if;
end $$;

-- The rows that this worker holds under this token.
create or replace function maskd.held(worker uuid, token uuid) returns setof maskd.claimed
language sql stable set search_path = '' as $$
  select r.id::text, r.kind::text, r.project_id::text,
      coalesce(r.user_id, (select p.user_id from public.projects p where p.id = r.project_id))::text,
      r.source_image_url::text, r.text_prompt::text, r.params::text, r.attempts::integer, r.max_attempts::integer, r.deaths::integer,
      extract(epoch from r.started_at - coalesce(r.pending_at, r.created_at))::float8, r.priority::smallint, r.fair_rank::float8, null::float8,
      null::boolean
    from public.segmentation_results r where r.worker_id = worker and r.claim_token = token and r.status = 'processing'
$$;

-- Delayed rows that are due become claimable, with a fair rank of now.
create or replace function maskd.promote_due() returns void
language plpgsql set search_path = '' as $$
begin
  update public.segmentation_results r
     set status = 'pending', pending_at = clock_timestamp(), updated_at = now(),
         fair_rank = maskd.rank(r.kind::text, coalesce(r.priority, 0)::smallint, r.user_id)
   where r.id in (select d.id from public.segmentation_results d
                   where d.status = 'delayed' and d.run_after <= clock_timestamp()
                   order by d.run_after limit 500 for update skip locked);
end $$;

-- Locks and returns up to `most` claimable rows, kinds in the order given, none that it does not return.
create or replace function maskd.pick(kinds text[], most integer, held uuid[]) returns uuid[]
language plpgsql set search_path = '' as $$
declare
  next_kind text;
  ids uuid[] := '{}';
begin
  foreach next_kind in array kinds loop
    ids := ids || array(
      select r.id from public.segmentation_results r
       where r.kind = next_kind and r.status = 'pending' and r.deaths = 0 and r.id <> all (held)
       order by r.priority desc, r.fair_rank, r.id limit most - cardinality(ids) for update skip locked);
    exit when cardinality(ids) >= most;
  end loop;
  return ids;
end $$;

-- Pending rows of the same users and the same images as rows already picked, so that an image is fetched and encoded once.
create or replace function maskd.pick_same_images(kinds text[], most integer, held uuid[]) returns uuid[]
language sql set search_path = '' as $$
  select coalesce(array_agg(same.id), '{}') from (
    select near.id
      from (select distinct r.source_image_url, r.user_id from public.segmentation_results r where r.id = any (held)) image
      cross join unnest(kinds) near_kind
      cross join lateral (
        select r.id from public.segmentation_results r
         where r.kind = near_kind and r.user_id = image.user_id and r.source_image_url = image.source_image_url
           and r.status = 'pending' and r.deaths = 0 and r.id <> all (held)
         order by r.fair_rank limit most for update skip locked) near
     limit most) same
$$;

-- Half of a claim by rank, then rows of the same images, then by rank again.
create or replace function maskd.pick_by_image(kinds text[], most integer) returns uuid[]
language plpgsql set search_path = '' as $$
declare
  ids uuid[] := maskd.pick(kinds, most - most / 2, '{}');
begin
  if cardinality(ids) = most - most / 2 and most > 1 then
    ids := ids || maskd.pick_same_images(kinds, most / 2, ids);
    if cardinality(ids) < most then
      ids := ids || maskd.pick(kinds, most - cardinality(ids), ids);
    end if;
  end if;
  return ids;
end $$;

-- Up to `most` rows for this worker under this token, in no order: the caller sorts by priority and fair rank. Overlapping calls
-- with one token are serialised and answer alike. When fewer came, or suspects have waited for long, one more row, without id,
-- tells when the next delayed row is due, and whether suspects wait to be isolated.
-- Plans are generic, since planning anew would cost more than these few index look-ups; one statement looks at everything.
create or replace function maskd.claim(worker uuid, token uuid, kinds text[], most integer) returns setof maskd.claimed
language plpgsql set search_path = '' set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare
  look record;
  ids uuid[] := '{}';
begin
  perform pg_advisory_xact_lock(hashtextextended(token::text, 0));
  for turn in 1..2 loop
    select exists (select from public.segmentation_results r
                    where r.worker_id = worker and r.claim_token = token and r.status = 'processing') as held,
           (select r.run_after from public.segmentation_results r where r.status = 'delayed' order by r.run_after limit 1) as next_run,
           (select min(r.pending_at) from public.segmentation_results r
             where r.status = 'pending' and r.deaths > 0 and r.kind = any (kinds)) as suspect_since,
           heads.ordered, heads.images into look
      from (select array_agg(k.kind order by head.priority desc, head.fair_rank, head.id) as ordered,
                   bool_or(head.source_image_url is not null) as images
              from maskd.kinds k
             cross join lateral (select r.priority, r.fair_rank, r.id, r.source_image_url from public.segmentation_results r
                where r.kind = k.kind and r.status = 'pending' and r.deaths = 0
                order by r.priority desc, r.fair_rank, r.id limit 1) head
             where k.kind = any (kinds) and not k.paused) heads;
    exit when look.next_run is null or look.next_run > clock_timestamp();
    perform maskd.promote_due();
  end loop;
  if look.held then
    return query select * from maskd.held(worker, token);
    return;
  end if;
  if cardinality(look.ordered) = 1 and (most = 1 or not look.images) then
    ids := array(select r.id from public.segmentation_results r
      where r.kind = look.ordered[1] and r.status = 'pending' and r.deaths = 0
      order by r.priority desc, r.fair_rank, r.id limit most for update skip locked);
  elsif look.images then
    ids := maskd.pick_by_image(look.ordered, most);
  elsif look.ordered is not null then
    ids := maskd.pick(look.ordered, most, '{}');
  end if;
  if cardinality(ids) > 0 then
    return query
      update public.segmentation_results r
         set status = 'processing', worker_id = worker, claim_token = token, attempts = r.attempts + 1,
             started_at = clock_timestamp(), updated_at = now(), error = null
       where r.id = any (ids)
      returning r.id::text, r.kind::text, r.project_id::text,
        coalesce(r.user_id, (select p.user_id from public.projects p where p.id = r.project_id))::text,
        r.source_image_url::text, r.text_prompt::text, r.params::text, r.attempts::integer, r.max_attempts::integer, r.deaths::integer,
        extract(epoch from r.started_at - coalesce(r.pending_at, r.created_at))::float8, r.priority::smallint, r.fair_rank::float8, null::float8,
        null::boolean;
  end if;
  if cardinality(ids) < most or look.suspect_since < clock_timestamp() - interval '10 seconds' then
    return query select null::text, null::text, null::text, null::text, null::text, null::text, null::text, null::integer,
      null::integer, null::integer, null::float8, null::smallint, null::float8,
      extract(epoch from look.next_run - clock_timestamp())::float8,
      look.suspect_since is not null and cardinality(maskd.suspect_kinds(kinds)) > 0;
  end if;
end $$;

-- Rows that were running when a worker died, for a worker that runs nothing else meanwhile: those with one death in a small
-- cohort of one kind, those with more alone. At most one worker isolates a kind at a time.
create or replace function maskd.claim_suspects(worker uuid, token uuid, kinds text[], most integer) returns setof maskd.claimed
language plpgsql set search_path = '' as $$
declare
  chosen_kind text;
  fewest integer;
begin
  perform pg_advisory_xact_lock(hashtextextended(token::text, 0));
  return query select * from maskd.held(worker, token);
  if found or not pg_try_advisory_xact_lock(hashtextextended('maskd.suspects', 0)) then
    return;
  end if;
  select k, s.deaths into chosen_kind, fewest from unnest(maskd.suspect_kinds(kinds)) k
    cross join lateral (select r.deaths, r.fair_rank from public.segmentation_results r
      where r.kind = k and r.status = 'pending' and r.deaths > 0 order by r.deaths, r.fair_rank limit 1) s
    order by s.deaths, s.fair_rank limit 1;
  update public.segmentation_results r
     set status = 'processing', worker_id = worker, claim_token = token, attempts = r.attempts + 1,
         started_at = clock_timestamp(), updated_at = now(), error = null
   where r.id = any (array(select p.id from public.segmentation_results p
     where p.kind = chosen_kind and p.status = 'pending' and p.deaths = fewest
     order by p.fair_rank, p.id limit case when fewest = 1 then least(most, 16) else 1 end for update skip locked));
  return query select * from maskd.held(worker, token);
end $$;

-- Kinds that have suspects waiting and none running.
create or replace function maskd.suspect_kinds(kinds text[]) returns text[]
language sql volatile set search_path = '' as $$
  select array(select k.kind from maskd.kinds k
    where k.kind = any (kinds) and not k.paused
      and exists (select from public.segmentation_results r where r.kind = k.kind and r.status = 'pending' and r.deaths > 0)
      and not exists (select from public.segmentation_results r where r.kind = k.kind and r.status = 'processing' and r.deaths > 0))
$$;

insert into maskd.migrations (version, name) values ('20261121000200', 'claim') on conflict do nothing;
