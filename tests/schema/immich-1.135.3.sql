-- Immich 1.135.3: the tables a description writer touches, for stock PostgreSQL (see README.md)

BEGIN;

CREATE TYPE assets_status_enum AS ENUM ('active', 'trashed', 'deleted');
CREATE TYPE asset_visibility_enum AS ENUM ('archive', 'timeline', 'hidden', 'locked');
CREATE TYPE sourcetype AS ENUM ('machine-learning', 'exif', 'manual');

-- time-ordered uuid: 48-bit unix milliseconds, version nibble 7, rest random
CREATE FUNCTION immich_uuid_v7(p_timestamp timestamp with time zone DEFAULT clock_timestamp())
RETURNS uuid LANGUAGE sql VOLATILE AS $$
  SELECT (lpad(to_hex(floor(extract(epoch FROM p_timestamp) * 1000)::bigint), 12, '0') || '7' || substr(r, 14))::uuid
  FROM (SELECT replace(gen_random_uuid()::text, '-', '') AS r) AS x
$$;

-- every UPDATE of a row stamps a new updatedAt and a new updateId
CREATE FUNCTION updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  stamp timestamp with time zone := clock_timestamp();
BEGIN
  NEW."updatedAt" := stamp;
  NEW."updateId" := immich_uuid_v7(stamp);
  RETURN NEW;
END $$;

CREATE TABLE "system_metadata" (
  "key" varchar NOT NULL,
  "value" jsonb NOT NULL,
  CONSTRAINT "PK_fa94f6857470fb5b81ec6084465" PRIMARY KEY (key)
);
CREATE TABLE "version_history" (
  "id" uuid NOT NULL DEFAULT gen_random_uuid(),
  "createdAt" timestamptz NOT NULL DEFAULT now(),
  "version" varchar NOT NULL,
  CONSTRAINT "PK_5db259cbb09ce82c0d13cfd1b23" PRIMARY KEY (id)
);
CREATE TABLE "users" (
  "id" uuid NOT NULL DEFAULT gen_random_uuid(),
  "email" varchar NOT NULL,
  "password" varchar NOT NULL DEFAULT '',
  "createdAt" timestamptz NOT NULL DEFAULT now(),
  "profileImagePath" varchar NOT NULL DEFAULT '',
  "isAdmin" boolean NOT NULL DEFAULT false,
  "shouldChangePassword" boolean NOT NULL DEFAULT true,
  "deletedAt" timestamptz,
  "oauthId" varchar NOT NULL DEFAULT '',
  "updatedAt" timestamptz NOT NULL DEFAULT now(),
  "storageLabel" varchar,
  "name" varchar NOT NULL DEFAULT '',
  "quotaSizeInBytes" bigint,
  "quotaUsageInBytes" bigint NOT NULL DEFAULT 0,
  "status" varchar NOT NULL DEFAULT 'active',
  "profileChangedAt" timestamptz NOT NULL DEFAULT now(),
  "updateId" uuid NOT NULL DEFAULT immich_uuid_v7(),
  "avatarColor" varchar,
  "pinCode" varchar,
  CONSTRAINT "PK_a3ffb1c0c8416b9fc6f907b7433" PRIMARY KEY (id),
  CONSTRAINT "UQ_97672ac88f789774dd47f7c8be3" UNIQUE (email),
  CONSTRAINT "UQ_b309cf34fa58137c416b32cea3a" UNIQUE ("storageLabel")
);
CREATE TABLE "assets" (
  "id" uuid NOT NULL DEFAULT gen_random_uuid(),
  "deviceAssetId" varchar NOT NULL,
  "ownerId" uuid NOT NULL,
  "deviceId" varchar NOT NULL,
  "type" varchar NOT NULL,
  "originalPath" varchar NOT NULL,
  "fileCreatedAt" timestamptz NOT NULL,
  "fileModifiedAt" timestamptz NOT NULL,
  "isFavorite" boolean NOT NULL DEFAULT false,
  "duration" varchar,
  "encodedVideoPath" varchar DEFAULT '',
  "checksum" bytea NOT NULL,
  "livePhotoVideoId" uuid,
  "updatedAt" timestamptz NOT NULL DEFAULT now(),
  "createdAt" timestamptz NOT NULL DEFAULT now(),
  "originalFileName" varchar NOT NULL,
  "sidecarPath" varchar,
  "thumbhash" bytea,
  "isOffline" boolean NOT NULL DEFAULT false,
  "libraryId" uuid,
  "isExternal" boolean NOT NULL DEFAULT false,
  "deletedAt" timestamptz,
  "localDateTime" timestamptz NOT NULL,
  "stackId" uuid,
  "duplicateId" uuid,
  "status" assets_status_enum NOT NULL DEFAULT 'active'::assets_status_enum,
  "updateId" uuid NOT NULL DEFAULT immich_uuid_v7(),
  "visibility" asset_visibility_enum NOT NULL DEFAULT 'timeline'::asset_visibility_enum,
  CONSTRAINT "PK_da96729a8b113377cfb6a62439c" PRIMARY KEY (id)
);
CREATE TABLE "exif" (
  "assetId" uuid NOT NULL,
  "make" varchar,
  "model" varchar,
  "exifImageWidth" integer,
  "exifImageHeight" integer,
  "fileSizeInByte" bigint,
  "orientation" varchar,
  "dateTimeOriginal" timestamptz,
  "modifyDate" timestamptz,
  "lensModel" varchar,
  "fNumber" double precision,
  "focalLength" double precision,
  "iso" integer,
  "latitude" double precision,
  "longitude" double precision,
  "city" varchar,
  "state" varchar,
  "country" varchar,
  "description" text NOT NULL DEFAULT '',
  "fps" double precision,
  "exposureTime" varchar,
  "livePhotoCID" varchar,
  "timeZone" varchar,
  "projectionType" varchar,
  "profileDescription" varchar,
  "colorspace" varchar,
  "bitsPerSample" integer,
  "autoStackId" varchar,
  "rating" integer,
  "updatedAt" timestamptz NOT NULL DEFAULT clock_timestamp(),
  "updateId" uuid NOT NULL DEFAULT immich_uuid_v7(),
  CONSTRAINT "PK_c0117fdbc50b917ef9067740c44" PRIMARY KEY ("assetId")
);
CREATE TABLE "asset_files" (
  "id" uuid NOT NULL DEFAULT gen_random_uuid(),
  "assetId" uuid NOT NULL,
  "createdAt" timestamptz NOT NULL DEFAULT now(),
  "updatedAt" timestamptz NOT NULL DEFAULT now(),
  "type" varchar NOT NULL,
  "path" varchar NOT NULL,
  "updateId" uuid NOT NULL DEFAULT immich_uuid_v7(),
  CONSTRAINT "PK_c41dc3e9ef5e1c57ca5a08a0004" PRIMARY KEY (id),
  CONSTRAINT "UQ_assetId_type" UNIQUE ("assetId", type)
);
CREATE TABLE "asset_job_status" (
  "assetId" uuid NOT NULL,
  "facesRecognizedAt" timestamptz,
  "metadataExtractedAt" timestamptz,
  "duplicatesDetectedAt" timestamptz,
  "previewAt" timestamptz,
  "thumbnailAt" timestamptz,
  CONSTRAINT "PK_420bec36fc02813bddf5c8b73d4" PRIMARY KEY ("assetId")
);
CREATE TABLE "person" (
  "id" uuid NOT NULL DEFAULT gen_random_uuid(),
  "createdAt" timestamptz NOT NULL DEFAULT now(),
  "updatedAt" timestamptz NOT NULL DEFAULT now(),
  "ownerId" uuid NOT NULL,
  "name" varchar NOT NULL DEFAULT '',
  "thumbnailPath" varchar NOT NULL DEFAULT '',
  "isHidden" boolean NOT NULL DEFAULT false,
  "birthDate" date,
  "faceAssetId" uuid,
  "isFavorite" boolean NOT NULL DEFAULT false,
  "color" varchar,
  "updateId" uuid NOT NULL DEFAULT immich_uuid_v7(),
  CONSTRAINT "PK_5fdaf670315c4b7e70cce85daa3" PRIMARY KEY (id),
  CONSTRAINT "CHK_b0f82b0ed662bfc24fbb58bb45" CHECK (("birthDate" <= CURRENT_DATE))
);
CREATE TABLE "asset_faces" (
  "assetId" uuid NOT NULL,
  "personId" uuid,
  "imageWidth" integer NOT NULL DEFAULT 0,
  "imageHeight" integer NOT NULL DEFAULT 0,
  "boundingBoxX1" integer NOT NULL DEFAULT 0,
  "boundingBoxY1" integer NOT NULL DEFAULT 0,
  "boundingBoxX2" integer NOT NULL DEFAULT 0,
  "boundingBoxY2" integer NOT NULL DEFAULT 0,
  "id" uuid NOT NULL DEFAULT gen_random_uuid(),
  "sourceType" sourcetype NOT NULL DEFAULT 'machine-learning'::sourcetype,
  "deletedAt" timestamptz,
  CONSTRAINT "PK_6df76ab2eb6f5b57b7c2f1fc684" PRIMARY KEY (id)
);
CREATE TABLE "tags" (
  "id" uuid NOT NULL DEFAULT gen_random_uuid(),
  "userId" uuid NOT NULL,
  "value" varchar NOT NULL,
  "createdAt" timestamptz NOT NULL DEFAULT now(),
  "updatedAt" timestamptz NOT NULL DEFAULT now(),
  "color" varchar,
  "parentId" uuid,
  "updateId" uuid NOT NULL DEFAULT immich_uuid_v7(),
  CONSTRAINT "PK_e7dc17249a1148a1970748eda99" PRIMARY KEY (id),
  CONSTRAINT "UQ_79d6f16e52bb2c7130375246793" UNIQUE ("userId", value)
);
CREATE TABLE "tag_asset" (
  "assetsId" uuid NOT NULL,
  "tagsId" uuid NOT NULL,
  CONSTRAINT "PK_ef5346fe522b5fb3bc96454747e" PRIMARY KEY ("assetsId", "tagsId")
);
CREATE TABLE "albums" (
  "id" uuid NOT NULL DEFAULT gen_random_uuid(),
  "ownerId" uuid NOT NULL,
  "albumName" varchar NOT NULL DEFAULT 'Untitled Album',
  "createdAt" timestamptz NOT NULL DEFAULT now(),
  "albumThumbnailAssetId" uuid,
  "updatedAt" timestamptz NOT NULL DEFAULT now(),
  "description" text NOT NULL DEFAULT '',
  "deletedAt" timestamptz,
  "isActivityEnabled" boolean NOT NULL DEFAULT true,
  "order" varchar NOT NULL DEFAULT 'desc',
  "updateId" uuid NOT NULL DEFAULT immich_uuid_v7(),
  CONSTRAINT "PK_7f71c7b5bc7c87b8f94c9a93a00" PRIMARY KEY (id)
);
CREATE TABLE "albums_shared_users_users" (
  "albumsId" uuid NOT NULL,
  "usersId" uuid NOT NULL,
  "role" varchar NOT NULL DEFAULT 'editor',
  "updateId" uuid NOT NULL DEFAULT immich_uuid_v7(),
  "updatedAt" timestamptz NOT NULL DEFAULT now(),
  "createId" uuid NOT NULL DEFAULT immich_uuid_v7(),
  "createdAt" timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT "PK_7df55657e0b2e8b626330a0ebc8" PRIMARY KEY ("albumsId", "usersId")
);
CREATE TABLE "albums_assets_assets" (
  "albumsId" uuid NOT NULL,
  "assetsId" uuid NOT NULL,
  "createdAt" timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT "PK_c67bc36fa845fb7b18e0e398180" PRIMARY KEY ("albumsId", "assetsId")
);

ALTER TABLE "assets" ADD CONSTRAINT "FK_16294b83fa8c0149719a1f631ef" FOREIGN KEY ("livePhotoVideoId") REFERENCES assets(id) ON UPDATE CASCADE ON DELETE SET NULL;
ALTER TABLE "assets" ADD CONSTRAINT "FK_2c5ac0d6fb58b238fd2068de67d" FOREIGN KEY ("ownerId") REFERENCES users(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "exif" ADD CONSTRAINT "FK_c0117fdbc50b917ef9067740c44" FOREIGN KEY ("assetId") REFERENCES assets(id) ON DELETE CASCADE;
ALTER TABLE "asset_files" ADD CONSTRAINT "FK_e3e103a5f1d8bc8402999286040" FOREIGN KEY ("assetId") REFERENCES assets(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "asset_job_status" ADD CONSTRAINT "FK_420bec36fc02813bddf5c8b73d4" FOREIGN KEY ("assetId") REFERENCES assets(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "person" ADD CONSTRAINT "FK_2bbabe31656b6778c6b87b61023" FOREIGN KEY ("faceAssetId") REFERENCES asset_faces(id) ON DELETE SET NULL;
ALTER TABLE "person" ADD CONSTRAINT "FK_5527cc99f530a547093f9e577b6" FOREIGN KEY ("ownerId") REFERENCES users(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "asset_faces" ADD CONSTRAINT "FK_02a43fd0b3c50fb6d7f0cb7282c" FOREIGN KEY ("assetId") REFERENCES assets(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "asset_faces" ADD CONSTRAINT "FK_95ad7106dd7b484275443f580f9" FOREIGN KEY ("personId") REFERENCES person(id) ON UPDATE CASCADE ON DELETE SET NULL;
ALTER TABLE "tags" ADD CONSTRAINT "FK_92e67dc508c705dd66c94615576" FOREIGN KEY ("userId") REFERENCES users(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "tags" ADD CONSTRAINT "FK_9f9590cc11561f1f48ff034ef99" FOREIGN KEY ("parentId") REFERENCES tags(id) ON DELETE CASCADE;
ALTER TABLE "tag_asset" ADD CONSTRAINT "FK_e99f31ea4cdf3a2c35c7287eb42" FOREIGN KEY ("tagsId") REFERENCES tags(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "tag_asset" ADD CONSTRAINT "FK_f8e8a9e893cb5c54907f1b798e9" FOREIGN KEY ("assetsId") REFERENCES assets(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "albums" ADD CONSTRAINT "FK_05895aa505a670300d4816debce" FOREIGN KEY ("albumThumbnailAssetId") REFERENCES assets(id) ON UPDATE CASCADE ON DELETE SET NULL;
ALTER TABLE "albums" ADD CONSTRAINT "FK_b22c53f35ef20c28c21637c85f4" FOREIGN KEY ("ownerId") REFERENCES users(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "albums_shared_users_users" ADD CONSTRAINT "FK_427c350ad49bd3935a50baab737" FOREIGN KEY ("albumsId") REFERENCES albums(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "albums_shared_users_users" ADD CONSTRAINT "FK_f48513bf9bccefd6ff3ad30bd06" FOREIGN KEY ("usersId") REFERENCES users(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "albums_assets_assets" ADD CONSTRAINT "FK_4bd1303d199f4e72ccdf998c621" FOREIGN KEY ("assetsId") REFERENCES assets(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "albums_assets_assets" ADD CONSTRAINT "FK_e590fa396c6898fcd4a50e40927" FOREIGN KEY ("albumsId") REFERENCES albums(id) ON UPDATE CASCADE ON DELETE CASCADE;

CREATE INDEX "IDX_users_update_id" ON users ("updateId");
CREATE INDEX "IDX_users_updated_at_asc_id_asc" ON users ("updatedAt", id);
CREATE INDEX "IDX_16294b83fa8c0149719a1f631e" ON assets ("livePhotoVideoId");
CREATE INDEX "IDX_2c5ac0d6fb58b238fd2068de67" ON assets ("ownerId");
CREATE INDEX "IDX_4d66e76dada1ca180f67a205dc" ON assets ("originalFileName");
CREATE INDEX "IDX_8d3efe36c0755849395e6ea866" ON assets (checksum);
CREATE INDEX "IDX_9977c3c1de01c3d848039a6b90" ON assets ("libraryId");
CREATE INDEX "IDX_asset_id_stackId" ON assets (id, "stackId");
CREATE INDEX "IDX_assets_duplicateId" ON assets ("duplicateId");
CREATE INDEX "IDX_assets_update_id" ON assets ("updateId");
CREATE INDEX "IDX_f15d48fa3ea5e4bda05ca8ab20" ON assets ("stackId");
CREATE INDEX "IDX_originalPath_libraryId" ON assets ("originalPath", "libraryId");
CREATE UNIQUE INDEX "UQ_assets_owner_checksum" ON assets ("ownerId", checksum) WHERE ("libraryId" IS NULL);
CREATE UNIQUE INDEX "UQ_assets_owner_library_checksum" ON assets ("ownerId", "libraryId", checksum) WHERE ("libraryId" IS NOT NULL);
CREATE INDEX idx_asset_file_created_at ON assets ("fileCreatedAt");
CREATE INDEX idx_local_date_time ON assets (((("localDateTime" AT TIME ZONE 'UTC'::text))::date));
CREATE INDEX idx_local_date_time_month ON assets (((date_trunc('MONTH'::text, ("localDateTime" AT TIME ZONE 'UTC'::text)) AT TIME ZONE 'UTC'::text)));
CREATE INDEX "IDX_asset_exif_update_id" ON exif ("updateId");
CREATE INDEX "IDX_auto_stack_id" ON exif ("autoStackId");
CREATE INDEX "IDX_live_photo_cid" ON exif ("livePhotoCID");
CREATE INDEX exif_city ON exif (city);
CREATE INDEX "IDX_asset_files_assetId" ON asset_files ("assetId");
CREATE INDEX "IDX_asset_files_update_id" ON asset_files ("updateId");
CREATE INDEX "IDX_2bbabe31656b6778c6b87b6102" ON person ("faceAssetId");
CREATE INDEX "IDX_5527cc99f530a547093f9e577b" ON person ("ownerId");
CREATE INDEX "IDX_person_update_id" ON person ("updateId");
CREATE INDEX "IDX_asset_faces_assetId_personId" ON asset_faces ("assetId", "personId");
CREATE INDEX "IDX_bf339a24070dac7e71304ec530" ON asset_faces ("personId", "assetId");
CREATE INDEX "IDX_9f9590cc11561f1f48ff034ef9" ON tags ("parentId");
CREATE INDEX "IDX_tags_update_id" ON tags ("updateId");
CREATE INDEX "IDX_e99f31ea4cdf3a2c35c7287eb4" ON tag_asset ("tagsId");
CREATE INDEX "IDX_f8e8a9e893cb5c54907f1b798e" ON tag_asset ("assetsId");
CREATE INDEX "IDX_tag_asset_assetsId_tagsId" ON tag_asset ("assetsId", "tagsId");
CREATE INDEX "IDX_05895aa505a670300d4816debc" ON albums ("albumThumbnailAssetId");
CREATE INDEX "IDX_albums_update_id" ON albums ("updateId");
CREATE INDEX "IDX_b22c53f35ef20c28c21637c85f" ON albums ("ownerId");
CREATE INDEX "IDX_427c350ad49bd3935a50baab73" ON albums_shared_users_users ("albumsId");
CREATE INDEX "IDX_album_users_create_id" ON albums_shared_users_users ("createId");
CREATE INDEX "IDX_album_users_update_id" ON albums_shared_users_users ("updateId");
CREATE INDEX "IDX_f48513bf9bccefd6ff3ad30bd0" ON albums_shared_users_users ("usersId");
CREATE INDEX "IDX_4bd1303d199f4e72ccdf998c62" ON albums_assets_assets ("assetsId");
CREATE INDEX "IDX_e590fa396c6898fcd4a50e4092" ON albums_assets_assets ("albumsId");

CREATE TRIGGER asset_files_updated_at BEFORE UPDATE ON asset_files FOR EACH ROW EXECUTE FUNCTION updated_at();
CREATE TRIGGER assets_updated_at BEFORE UPDATE ON assets FOR EACH ROW EXECUTE FUNCTION updated_at();
CREATE TRIGGER asset_exif_updated_at BEFORE UPDATE ON exif FOR EACH ROW EXECUTE FUNCTION updated_at();
CREATE TRIGGER person_updated_at BEFORE UPDATE ON person FOR EACH ROW EXECUTE FUNCTION updated_at();
CREATE TRIGGER tags_updated_at BEFORE UPDATE ON tags FOR EACH ROW EXECUTE FUNCTION updated_at();
CREATE TRIGGER users_updated_at BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION updated_at();
CREATE TRIGGER albums_updated_at BEFORE UPDATE ON albums FOR EACH ROW EXECUTE FUNCTION updated_at();
CREATE TRIGGER album_users_updated_at BEFORE UPDATE ON albums_shared_users_users FOR EACH ROW EXECUTE FUNCTION updated_at();

COMMIT;
