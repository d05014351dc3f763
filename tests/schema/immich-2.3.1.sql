-- Immich 2.3.1: the tables a description writer touches, for stock PostgreSQL (see README.md)

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

-- deleted notes are listed for clients that synchronise, with the rights of whoever deletes
CREATE FUNCTION asset_metadata_audit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO asset_metadata_audit ("assetId", "key") SELECT gone."assetId", gone."key" FROM gone;
  RETURN NULL;
END $$;

CREATE TABLE "system_metadata" (
  "key" varchar NOT NULL,
  "value" jsonb NOT NULL,
  CONSTRAINT "system_metadata_pkey" PRIMARY KEY (key)
);
CREATE TABLE "version_history" (
  "id" uuid NOT NULL DEFAULT gen_random_uuid(),
  "createdAt" timestamptz NOT NULL DEFAULT now(),
  "version" varchar NOT NULL,
  CONSTRAINT "version_history_pkey" PRIMARY KEY (id)
);
CREATE TABLE "user" (
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
  CONSTRAINT "user_pkey" PRIMARY KEY (id),
  CONSTRAINT "user_email_uq" UNIQUE (email),
  CONSTRAINT "user_storageLabel_uq" UNIQUE ("storageLabel")
);
CREATE TABLE "asset" (
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
  CONSTRAINT "asset_pkey" PRIMARY KEY (id)
);
CREATE TABLE "asset_exif" (
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
  CONSTRAINT "asset_exif_pkey" PRIMARY KEY ("assetId")
);
CREATE TABLE "asset_file" (
  "id" uuid NOT NULL DEFAULT gen_random_uuid(),
  "assetId" uuid NOT NULL,
  "createdAt" timestamptz NOT NULL DEFAULT now(),
  "updatedAt" timestamptz NOT NULL DEFAULT now(),
  "type" varchar NOT NULL,
  "path" varchar NOT NULL,
  "updateId" uuid NOT NULL DEFAULT immich_uuid_v7(),
  CONSTRAINT "asset_file_pkey" PRIMARY KEY (id),
  CONSTRAINT "asset_file_assetId_type_uq" UNIQUE ("assetId", type)
);
CREATE TABLE "asset_job_status" (
  "assetId" uuid NOT NULL,
  "facesRecognizedAt" timestamptz,
  "metadataExtractedAt" timestamptz,
  "duplicatesDetectedAt" timestamptz,
  "previewAt" timestamptz,
  "thumbnailAt" timestamptz,
  "ocrAt" timestamptz,
  CONSTRAINT "asset_job_status_pkey" PRIMARY KEY ("assetId")
);
CREATE TABLE "asset_metadata" (
  "assetId" uuid NOT NULL,
  "key" varchar NOT NULL,
  "value" jsonb NOT NULL,
  "updateId" uuid NOT NULL DEFAULT immich_uuid_v7(),
  "updatedAt" timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT "asset_metadata_pkey" PRIMARY KEY ("assetId", key)
);
CREATE TABLE "asset_metadata_audit" (
  "id" uuid NOT NULL DEFAULT immich_uuid_v7(),
  "assetId" uuid NOT NULL,
  "key" varchar NOT NULL,
  "deletedAt" timestamptz NOT NULL DEFAULT clock_timestamp(),
  CONSTRAINT "asset_metadata_audit_pkey" PRIMARY KEY (id)
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
  CONSTRAINT "person_pkey" PRIMARY KEY (id),
  CONSTRAINT "person_birthDate_chk" CHECK (("birthDate" <= CURRENT_DATE))
);
CREATE TABLE "asset_face" (
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
  "updatedAt" timestamptz NOT NULL DEFAULT now(),
  "updateId" uuid NOT NULL DEFAULT immich_uuid_v7(),
  CONSTRAINT "asset_face_pkey" PRIMARY KEY (id)
);
CREATE TABLE "tag" (
  "id" uuid NOT NULL DEFAULT gen_random_uuid(),
  "userId" uuid NOT NULL,
  "value" varchar NOT NULL,
  "createdAt" timestamptz NOT NULL DEFAULT now(),
  "updatedAt" timestamptz NOT NULL DEFAULT now(),
  "color" varchar,
  "parentId" uuid,
  "updateId" uuid NOT NULL DEFAULT immich_uuid_v7(),
  CONSTRAINT "tag_pkey" PRIMARY KEY (id),
  CONSTRAINT "tag_userId_value_uq" UNIQUE ("userId", value)
);
CREATE TABLE "tag_asset" (
  "assetId" uuid NOT NULL,
  "tagId" uuid NOT NULL,
  CONSTRAINT "tag_asset_pkey" PRIMARY KEY ("assetId", "tagId")
);
CREATE TABLE "asset_ocr" (
  "id" uuid NOT NULL DEFAULT gen_random_uuid(),
  "assetId" uuid NOT NULL,
  "x1" real NOT NULL,
  "y1" real NOT NULL,
  "x2" real NOT NULL,
  "y2" real NOT NULL,
  "x3" real NOT NULL,
  "y3" real NOT NULL,
  "x4" real NOT NULL,
  "y4" real NOT NULL,
  "boxScore" real NOT NULL,
  "textScore" real NOT NULL,
  "text" text NOT NULL,
  CONSTRAINT "asset_ocr_pkey" PRIMARY KEY (id)
);
CREATE TABLE "album" (
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
  CONSTRAINT "album_pkey" PRIMARY KEY (id)
);
CREATE TABLE "album_user" (
  "albumId" uuid NOT NULL,
  "userId" uuid NOT NULL,
  "role" varchar NOT NULL DEFAULT 'editor',
  "updateId" uuid NOT NULL DEFAULT immich_uuid_v7(),
  "updatedAt" timestamptz NOT NULL DEFAULT now(),
  "createId" uuid NOT NULL DEFAULT immich_uuid_v7(),
  "createdAt" timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT "album_user_pkey" PRIMARY KEY ("albumId", "userId")
);
CREATE TABLE "album_asset" (
  "albumId" uuid NOT NULL,
  "assetId" uuid NOT NULL,
  "createdAt" timestamptz NOT NULL DEFAULT now(),
  "updatedAt" timestamptz NOT NULL DEFAULT now(),
  "updateId" uuid NOT NULL DEFAULT immich_uuid_v7(),
  CONSTRAINT "album_asset_pkey" PRIMARY KEY ("albumId", "assetId")
);

ALTER TABLE "asset" ADD CONSTRAINT "asset_livePhotoVideoId_fkey" FOREIGN KEY ("livePhotoVideoId") REFERENCES asset(id) ON UPDATE CASCADE ON DELETE SET NULL;
ALTER TABLE "asset" ADD CONSTRAINT "asset_ownerId_fkey" FOREIGN KEY ("ownerId") REFERENCES "user"(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "asset_exif" ADD CONSTRAINT "asset_exif_assetId_fkey" FOREIGN KEY ("assetId") REFERENCES asset(id) ON DELETE CASCADE;
ALTER TABLE "asset_file" ADD CONSTRAINT "asset_file_assetId_fkey" FOREIGN KEY ("assetId") REFERENCES asset(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "asset_job_status" ADD CONSTRAINT "asset_job_status_assetId_fkey" FOREIGN KEY ("assetId") REFERENCES asset(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "asset_metadata" ADD CONSTRAINT "asset_metadata_assetId_fkey" FOREIGN KEY ("assetId") REFERENCES asset(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "person" ADD CONSTRAINT "person_faceAssetId_fkey" FOREIGN KEY ("faceAssetId") REFERENCES asset_face(id) ON DELETE SET NULL;
ALTER TABLE "person" ADD CONSTRAINT "person_ownerId_fkey" FOREIGN KEY ("ownerId") REFERENCES "user"(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "asset_face" ADD CONSTRAINT "asset_face_assetId_fkey" FOREIGN KEY ("assetId") REFERENCES asset(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "asset_face" ADD CONSTRAINT "asset_face_personId_fkey" FOREIGN KEY ("personId") REFERENCES person(id) ON UPDATE CASCADE ON DELETE SET NULL;
ALTER TABLE "tag" ADD CONSTRAINT "tag_parentId_fkey" FOREIGN KEY ("parentId") REFERENCES tag(id) ON DELETE CASCADE;
ALTER TABLE "tag" ADD CONSTRAINT "tag_userId_fkey" FOREIGN KEY ("userId") REFERENCES "user"(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "tag_asset" ADD CONSTRAINT "tag_asset_assetId_fkey" FOREIGN KEY ("assetId") REFERENCES asset(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "tag_asset" ADD CONSTRAINT "tag_asset_tagId_fkey" FOREIGN KEY ("tagId") REFERENCES tag(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "asset_ocr" ADD CONSTRAINT "asset_ocr_assetId_fkey" FOREIGN KEY ("assetId") REFERENCES asset(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "album" ADD CONSTRAINT "album_albumThumbnailAssetId_fkey" FOREIGN KEY ("albumThumbnailAssetId") REFERENCES asset(id) ON UPDATE CASCADE ON DELETE SET NULL;
ALTER TABLE "album" ADD CONSTRAINT "album_ownerId_fkey" FOREIGN KEY ("ownerId") REFERENCES "user"(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "album_user" ADD CONSTRAINT "album_user_albumId_fkey" FOREIGN KEY ("albumId") REFERENCES album(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "album_user" ADD CONSTRAINT "album_user_userId_fkey" FOREIGN KEY ("userId") REFERENCES "user"(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "album_asset" ADD CONSTRAINT "album_asset_albumId_fkey" FOREIGN KEY ("albumId") REFERENCES album(id) ON UPDATE CASCADE ON DELETE CASCADE;
ALTER TABLE "album_asset" ADD CONSTRAINT "album_asset_assetId_fkey" FOREIGN KEY ("assetId") REFERENCES asset(id) ON UPDATE CASCADE ON DELETE CASCADE;

CREATE INDEX "user_updateId_idx" ON "user" ("updateId");
CREATE INDEX "user_updatedAt_id_idx" ON "user" ("updatedAt", id);
CREATE UNIQUE INDEX "UQ_assets_owner_checksum" ON asset ("ownerId", checksum) WHERE ("libraryId" IS NULL);
CREATE INDEX asset_checksum_idx ON asset (checksum);
CREATE INDEX "asset_duplicateId_idx" ON asset ("duplicateId");
CREATE INDEX "asset_fileCreatedAt_idx" ON asset ("fileCreatedAt");
CREATE INDEX "asset_id_stackId_idx" ON asset (id, "stackId");
CREATE INDEX "asset_libraryId_idx" ON asset ("libraryId");
CREATE INDEX "asset_livePhotoVideoId_idx" ON asset ("livePhotoVideoId");
CREATE INDEX "asset_localDateTime_idx" ON asset (((("localDateTime" AT TIME ZONE 'UTC'::text))::date));
CREATE INDEX "asset_localDateTime_month_idx" ON asset (((date_trunc('MONTH'::text, ("localDateTime" AT TIME ZONE 'UTC'::text)) AT TIME ZONE 'UTC'::text)));
CREATE INDEX "asset_originalFileName_idx" ON asset ("originalFileName");
CREATE INDEX "asset_originalPath_libraryId_idx" ON asset ("originalPath", "libraryId");
CREATE INDEX "asset_ownerId_idx" ON asset ("ownerId");
CREATE UNIQUE INDEX "asset_ownerId_libraryId_checksum_idx" ON asset ("ownerId", "libraryId", checksum) WHERE ("libraryId" IS NOT NULL);
CREATE INDEX "asset_stackId_idx" ON asset ("stackId");
CREATE INDEX "asset_updateId_idx" ON asset ("updateId");
CREATE INDEX "asset_exif_autoStackId_idx" ON asset_exif ("autoStackId");
CREATE INDEX asset_exif_city_idx ON asset_exif (city);
CREATE INDEX "asset_exif_livePhotoCID_idx" ON asset_exif ("livePhotoCID");
CREATE INDEX "asset_exif_updateId_idx" ON asset_exif ("updateId");
CREATE INDEX "asset_file_assetId_idx" ON asset_file ("assetId");
CREATE INDEX "asset_file_updateId_idx" ON asset_file ("updateId");
CREATE INDEX "asset_metadata_updateId_idx" ON asset_metadata ("updateId");
CREATE INDEX "asset_metadata_updatedAt_idx" ON asset_metadata ("updatedAt");
CREATE INDEX "person_faceAssetId_idx" ON person ("faceAssetId");
CREATE INDEX "person_ownerId_idx" ON person ("ownerId");
CREATE INDEX "person_updateId_idx" ON person ("updateId");
CREATE INDEX "asset_face_assetId_personId_idx" ON asset_face ("assetId", "personId");
CREATE INDEX "asset_face_personId_assetId_idx" ON asset_face ("personId", "assetId");
CREATE INDEX "tag_parentId_idx" ON tag ("parentId");
CREATE INDEX "tag_updateId_idx" ON tag ("updateId");
CREATE INDEX "tag_asset_assetId_idx" ON tag_asset ("assetId");
CREATE INDEX "tag_asset_assetId_tagId_idx" ON tag_asset ("assetId", "tagId");
CREATE INDEX "tag_asset_tagId_idx" ON tag_asset ("tagId");
CREATE INDEX "asset_ocr_assetId_idx" ON asset_ocr ("assetId");
CREATE INDEX "album_albumThumbnailAssetId_idx" ON album ("albumThumbnailAssetId");
CREATE INDEX "album_ownerId_idx" ON album ("ownerId");
CREATE INDEX "album_updateId_idx" ON album ("updateId");
CREATE INDEX "album_user_albumId_idx" ON album_user ("albumId");
CREATE INDEX "album_user_createId_idx" ON album_user ("createId");
CREATE INDEX "album_user_updateId_idx" ON album_user ("updateId");
CREATE INDEX "album_user_userId_idx" ON album_user ("userId");
CREATE INDEX "album_asset_albumId_idx" ON album_asset ("albumId");
CREATE INDEX "album_asset_assetId_idx" ON album_asset ("assetId");
CREATE INDEX "album_asset_updateId_idx" ON album_asset ("updateId");

CREATE TRIGGER "asset_updatedAt" BEFORE UPDATE ON asset FOR EACH ROW EXECUTE FUNCTION updated_at();
CREATE TRIGGER "asset_exif_updatedAt" BEFORE UPDATE ON asset_exif FOR EACH ROW EXECUTE FUNCTION updated_at();
CREATE TRIGGER "asset_face_updatedAt" BEFORE UPDATE ON asset_face FOR EACH ROW EXECUTE FUNCTION updated_at();
CREATE TRIGGER "asset_file_updatedAt" BEFORE UPDATE ON asset_file FOR EACH ROW EXECUTE FUNCTION updated_at();
CREATE TRIGGER asset_metadata_audit AFTER DELETE ON asset_metadata REFERENCING OLD TABLE AS gone FOR EACH STATEMENT WHEN ((pg_trigger_depth() = 0)) EXECUTE FUNCTION asset_metadata_audit();
CREATE TRIGGER asset_metadata_updated_at BEFORE UPDATE ON asset_metadata FOR EACH ROW EXECUTE FUNCTION updated_at();
CREATE TRIGGER "person_updatedAt" BEFORE UPDATE ON person FOR EACH ROW EXECUTE FUNCTION updated_at();
CREATE TRIGGER "tag_updatedAt" BEFORE UPDATE ON tag FOR EACH ROW EXECUTE FUNCTION updated_at();
CREATE TRIGGER "user_updatedAt" BEFORE UPDATE ON "user" FOR EACH ROW EXECUTE FUNCTION updated_at();
CREATE TRIGGER "album_updatedAt" BEFORE UPDATE ON album FOR EACH ROW EXECUTE FUNCTION updated_at();
CREATE TRIGGER "album_asset_updatedAt" BEFORE UPDATE ON album_asset FOR EACH ROW EXECUTE FUNCTION updated_at();
CREATE TRIGGER "album_user_updatedAt" BEFORE UPDATE ON album_user FOR EACH ROW EXECUTE FUNCTION updated_at();

COMMIT;
