-- The kind that finds every instance of a concept; its cost is that of an image through a large encoder.
set lock_timeout = '10s';

insert into maskd.kinds (kind, cost) values ('segment_concept', 2) on conflict (kind) do nothing;

insert into maskd.migrations (version, name) values ('20261121000500', 'segment_concept') on conflict do nothing;
