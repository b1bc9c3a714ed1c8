-- Who signs up gets a profile with credits to begin with; a user without one cannot pay for anything. The amount is yours to choose.
create or replace function public.welcome() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  insert into public.users_profile (id, tier, credits) values (new.id, 'free', 20) on conflict (id) do nothing;
  return new;
end $$;
revoke all on function public.welcome() from public, anon, authenticated;

create or replace trigger welcome after insert on auth.users for each row execute function public.welcome();
