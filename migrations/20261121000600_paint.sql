-- The kinds that need no model: they cost what reading, changing and writing an image takes.
set lock_timeout = '10s';

insert into maskd.kinds (kind, cost) values ('combine_masks', 0.2), ('paint_masks', 0.5), ('convert_image', 0.3)
  on conflict (kind) do nothing;

insert into maskd.migrations (version, name) values ('20261121000600', 'paint') on conflict do nothing;
