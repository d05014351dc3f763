-- The statements for Immich's own tables, 1.132 to 3.3, on PostgreSQL 14 and newer.
--
-- This is a Jinja template. A `macro` is a piece that several statements share. Further down, each
-- `set` is a statement that the tool runs by name; the comment above it says parameters → rows.
-- Parameters are written as psycopg2 expects, %(id)s; any other % is doubled. These comments are
-- not sent to the server, as only the contents of macros and statements are.
--
-- The template is given `tables`, each with its columns; `config`, the settings, which are also
-- parameters of each statement; and `ignored`, a regular expression for the descriptions that count
-- as none.


-- ------------------------------------------------------------------------------
-- Generations of Immich, told apart by tables and columns, not by version
-- ------------------------------------------------------------------------------

-- Photos, EXIF data and files; 1.136 renamed them.
{% set asset, exif, file = ('asset', 'asset_exif', 'asset_file') if 'asset_exif' in tables
                      else ('assets', 'exif', 'asset_files') %}
{% set needed = [asset, exif, file, 'asset_job_status'] %}
{% set face, album, in_album, of_album, tag =
    ('asset_face', 'album', 'album_asset', 'album_user', 'tag') if 'asset_exif' in tables else
    ('asset_faces', 'albums', 'albums_assets_assets', 'albums_shared_users_users', 'tags') %}

-- Up to 2.3, the columns of join tables are called "assetsId" and so on.
{% set s = 's' if 'assetsId' in tables.get('tag_asset', ()) else '' %}

-- 3.2 on: faces belong to groups, and each user can name a group.
{% set group = 'personGroupId' if 'personGroupId' in tables.get(face, ()) else 'personId' %}
{% set group_key = 'personGroupId' if group == 'personGroupId' else 'id' %}

-- The tables with the facts to read; the one with text in photos exists from 2.2 on.
{% set known_by = {'people': ['person', face], 'albums': [album, in_album, of_album],
                   'tags': [tag, 'tag_asset'],
                   'text': ['asset_ocr'] | select('in', tables) | list} %}
{% set user = 'user' if 'user' in tables else 'users' %}
{% set chosen_by = [album, in_album, of_album, user] * (config.album | length > 0) %}
{% set also_read = chosen_by + (known_by.items() | selectattr(0, 'in', config.context) | map('last') | sum(start=[])) %}

-- 1.133 on; before, there is only "isVisible".
{% set visibility = 'visibility' in tables.get(asset, ()) %}

-- 2.4 on: properties that Immich keeps when it extracts metadata from the file again.
{% set locks = 'lockedProperties' in tables.get(exif, ()) %}

-- 2.5 on: a photo that was edited has a second preview.
{% set edits = 'isEdited' in tables.get(file, ()) %}

-- 2.5 on: photos have notes. Their table is older, but held only Immich's own before.
{% set notes = 'isEdited' in tables.get(asset, ()) %}

-- Whether anything is to be written.
{% set writes = not config.dry_run %}


-- ------------------------------------------------------------------------------
-- Pieces: e is the EXIF row of photo a, j its job status, f its preview, m its note
-- ------------------------------------------------------------------------------

-- The edited preview comes first, as it is the one that people see.
{% macro source() %}
FROM {{ asset }} a
{% if notes %}
LEFT JOIN asset_metadata m ON m."assetId" = a.id AND m.key = %(key)s
{% endif %}
LEFT JOIN {{ exif }} e ON e."assetId" = a.id
LEFT JOIN asset_job_status j ON j."assetId" = a.id
LEFT JOIN LATERAL (
    SELECT path FROM {{ file }} WHERE "assetId" = a.id AND type = 'preview'
    {% if edits %} ORDER BY "isEdited" DESC {% endif %}
    LIMIT 1
) f ON true
{% endmacro %}

-- The facts about a photo, in the form of Immich's API. Names are those that its owner gave.
{% macro people() %}
SELECT jsonb_agg(to_jsonb(p)) FROM (
    SELECT p.name, p."isHidden", p."birthDate", jsonb_agg(jsonb_build_object(
        'boundingBoxX1', f."boundingBoxX1", 'imageWidth', f."imageWidth")) AS faces
    FROM {{ face }} f
    JOIN person p ON p."{{ group_key }}" = f."{{ group }}" AND p."ownerId" = a."ownerId"
    WHERE f."assetId" = a.id AND f."deletedAt" IS NULL
      {% if 'isVisible' in tables.get(face, ()) %} AND f."isVisible" {% endif %}
    GROUP BY p."ownerId", p."{{ group_key }}"
) p
{% endmacro %}

-- Only albums that the photo's owner has or shares: other people's albums are private.
{% macro albums() %}
SELECT jsonb_agg(b."albumName" ORDER BY b."albumName")
FROM {{ in_album }} i
JOIN {{ album }} b ON b.id = i."album{{ s }}Id" AND b."deletedAt" IS NULL
WHERE i."asset{{ s }}Id" = a.id AND (
    EXISTS (SELECT FROM {{ of_album }} u
            WHERE u."album{{ s }}Id" = b.id AND u."user{{ s }}Id" = a."ownerId")
    {% if 'ownerId' in tables.get(album, ()) %} OR b."ownerId" = a."ownerId" {% endif %}
)
{% endmacro %}

{% macro tags() %}
SELECT jsonb_agg(jsonb_build_object('value', t.value) ORDER BY t.value)
FROM tag_asset i
JOIN {{ tag }} t ON t.id = i."tag{{ s }}Id" AND t."userId" = a."ownerId"
WHERE i."asset{{ s }}Id" = a.id
{% endmacro %}

-- The text that Immich read in a photo (2.2 on), from top to bottom, without what was cropped away.
{% macro text() %}
SELECT jsonb_agg(jsonb_build_object('text', o.text) ORDER BY o.y1, o.x1)
FROM asset_ocr o
WHERE o."assetId" = a.id {% if 'isVisible' in tables['asset_ocr'] %} AND o."isVisible" {% endif %}
{% endmacro %}

-- All facts, or only those for listings, which leave out the text in photos because it is long.
{% macro facts(all) %}
{% if config.context %}
jsonb_build_object(
    'originalFileName', a."originalFileName",
    'localDateTime', a."localDateTime" AT TIME ZONE 'UTC',
    'exifInfo', jsonb_build_object(
        'city', e.city, 'state', e.state, 'country', e.country,
        'latitude', e.latitude, 'longitude', e.longitude,
        'make', e.make, 'model', e.model, 'lensModel', e."lensModel", 'iso', e.iso,
        'exposureTime', e."exposureTime", 'fNumber', e."fNumber", 'focalLength', e."focalLength"
    )
    {% if 'people' in config.context %}, 'people', ({{ people() }}) {% endif %}
    {% if 'albums' in config.context %}, 'albums', ({{ albums() }}) {% endif %}
    {% if 'tags' in config.context %}, 'tags', ({{ tags() }}) {% endif %}
    {% if all and 'asset_ocr' in also_read %}, 'ocr', ({{ text() }}) {% endif %}
)
{% else %}
'{}'::jsonb
{% endif %}
{% endmacro %}

-- The columns of a photo, in the order of the tool's record.
{% macro columns(all=false) %}
a.id, a."originalFileName", coalesce(e.description, ''), coalesce(f.path, ''), {{ ready() }},
{% if notes %} m.value {% else %} NULL {% endif %},
coalesce(a."libraryId"::text, ''), {{ facts(all) }}, a.type = 'VIDEO'
{% endmacro %}

-- The photo is one that people can find in their library.
{% macro live() %}
a."deletedAt" IS NULL AND a.status = 'active' AND NOT a."isOffline"
AND {% if visibility %} a.visibility IN ('timeline', 'archive') {% else %} a."isVisible" {% endif %}
AND a.type IN %(videos)s
{% endmacro %}

-- Before that, Immich may still write a description that it finds in the file.
{% macro extracted() %} j."metadataExtractedAt" IS NOT NULL {% endmacro %}

-- There is a preview to describe, and a row to write to.
{% macro ready() %}
{{ extracted() }} AND e."assetId" IS NOT NULL AND f.path IS NOT NULL
{% endmacro %}

-- Without coalesce(), which would hide from the planner how few photos lack a description.
{% macro empty() %} (e.description IS NULL OR e.description !~ '[^[:space:]]') {% endmacro %}

-- There is no description, or one of those to ignore.
{% macro undescribed() %}
{% if config.ignore_descriptions %}
({{ empty() }} OR e.description ~ $re${{ ignored | replace('%', '%%') }}$re$)
{% else %}
{{ empty() }}
{% endif %}
{% endmacro %}

-- The policy allows this description to be replaced.
{% macro replaceable() %}
{% if config.policy != 'none' %} true {% else %} {{ undescribed() }} {% endif %}
{% endmacro %}

-- The description is ours to the letter, by its note, or there is a block of ours in it. Converting
-- to the database's own encoding changes nothing.
{% macro ours() %}
(
    strpos(e.description, '[AI]') > 0
    AND e.description ~ $re$(^|\n)\[AI\][ \t\r\f\v]*\n(.*\n)?\[/AI\][ \t\r\f\v]*(\n|$)$re$
    {% if notes %}
    OR left(encode(sha256(convert_to(e.description, getdatabaseencoding())), 'hex'), 16)
        IN (m.value->>'text', m.value->>'was')
    {% endif %}
) IS TRUE
{% endmacro %}

-- By its note, the photo was asked about as it would be now.
{% macro asked() %}
m.value->>'model' = %(model_name)s AND m.value->>'prompt' = '{{ config.prompt_id }}'
{% endmacro %}

-- The photo needs a text by the policy and its note. That names have changed is left aside.
{% macro due() %}
{{ ready() }}
{% if notes and not config.retry_failed %}
AND NOT (
    {{ asked() }} AND m.value->>'failed' <> 'not_kept' AND m.value->'tries' >= '3'
) IS TRUE
{% endif %}
{% if config.policy == 'missing-ai' %}
AND NOT {{ ours() }}
{% elif config.policy == 'outdated' %}
AND ({{ undescribed() }} OR {{ ours() }} AND NOT ({{ asked() }} AND NOT m.value ? 'failed') IS TRUE)
{% else %}
AND {{ replaceable() }}
{% endif %}
{% endmacro %}

-- The photo is among those that the settings choose.
{% macro chosen() %}
true
{% if config.photo %} AND a.id IN %(photo)s {% endif %}
{% if config.album %}
AND EXISTS (SELECT FROM {{ in_album }} i
            WHERE i."asset{{ s }}Id" = a.id AND i."album{{ s }}Id" IN %(album)s)
{% endif %}
{% if config.taken_after %} AND a."localDateTime" >= %(taken_after)s {% endif %}
{% if config.taken_before %} AND a."localDateTime" < %(taken_before)s {% endif %}
{% if config.favorites %} AND a."isFavorite" {% endif %}
{% if config.library %} AND a."libraryId" = %(library)s {% endif %}
{% endmacro %}

-- The photos to describe.
{% macro wanted() %}
{{ live() }} AND {{ ready() }} AND {{ replaceable() }} AND {{ chosen() }}
{% endmacro %}


-- ------------------------------------------------------------------------------
-- Which photos there are
-- ------------------------------------------------------------------------------

-- since, after, page → the columns of a photo, and its id as the cursor for the next page; after
-- is NULL for the first one. The condition is repeated for each table, so that each is read from
-- there by its primary key. If only some photos are to be described, the newest come first; the
-- cursor is then the date and the id.
{% set newest_first = config.limit or config.dry_run %}
{% macro after() %} coalesce(%(after)s, '00000000-0000-0000-0000-000000000000')::uuid {% endmacro %}
{% macro newest() %} a."fileCreatedAt"::text || ',' || a.id {% endmacro %}
{% set listing %}
SELECT {{ columns() }}, {{ newest() if newest_first else 'a.id' }} AS mark
{{ source() }}
WHERE {{ wanted() }}
  AND (%(since)s IS NULL OR a."createdAt" >= %(since)s)
{% if newest_first %}
  AND (%(after)s IS NULL OR (a."fileCreatedAt", a.id)
       < (split_part(%(after)s, ',', 1)::timestamptz, split_part(%(after)s, ',', 2)::uuid))
ORDER BY a."fileCreatedAt" DESC, a.id DESC
{% else %}
  AND a.id > {{ after() }}
  AND e."assetId" > {{ after() }}
  AND j."assetId" > {{ after() }}
ORDER BY a.id
{% endif %}
LIMIT %(page)s
{% endset %}

-- since, uploaded → the same for all previews made since then, oldest first.
-- "updateId" is a version 7 UUID, which begins with its time in milliseconds.
{% set news %}
SELECT {{ columns() }}, n."updateId" AS mark
{{ source() }}
JOIN {{ file }} n ON n."assetId" = a.id AND n.type = 'preview'
WHERE {{ wanted() }}
  AND (%(uploaded)s IS NULL OR a."createdAt" >= %(uploaded)s)
  AND n."updateId" > (
      lpad(to_hex((extract(epoch FROM %(since)s) * 1000)::bigint), 12, '0') || repeat('0', 20)
  )::uuid
ORDER BY n."updateId"
{% endset %}

-- The same pages without texts, for when PostgreSQL cannot decode one of them.
{% macro bare(page) %}
SELECT id, id::text, '', '', true, NULL, '', '{}'::jsonb, false, mark FROM ({{ page }}) photos
{% endmacro %}
{% set bare_listing = bare(listing) %}
{% set bare_news = bare(news) %}

{% set count %}
SELECT count(*) {{ source() }} WHERE {{ wanted() }}
{% endset %}

-- id → the columns of a photo, if it is live.
{% set look %}
SELECT {{ columns(all=true) }}
{{ source() }}
WHERE a.id = %(id)s::uuid AND {{ live() }}
{% endset %}

-- id → the files of a video: first what Immich transcoded, if it did, then the original.
{% set video %}
SELECT "originalPath", 2 AS place FROM {{ asset }} WHERE id = %(id)s::uuid
UNION ALL
{% if 'encodedVideoPath' in tables.get(asset, ()) %}
SELECT "encodedVideoPath", 1 FROM {{ asset }} WHERE id = %(id)s::uuid AND "encodedVideoPath" <> ''
{% else %}
SELECT path, 1 FROM {{ file }} WHERE "assetId" = %(id)s::uuid AND type = 'encoded_video'
{% endif %}
ORDER BY place
{% endset %}

-- many → descriptions that are left alone, are not ours, and are shared by more photos than that,
-- and the number of those photos. Long texts are left out, as ours are long and slow to sort.
{% macro not_ours() %}
count(*) - count({% if notes %} m.value->>'text' {% else %} NULL {% endif %})
{% endmacro %}
{% set repeated %}
SELECT e.description, {{ not_ours() }}
{{ source() }}
WHERE {{ live() }} AND e.description = ANY (ARRAY(
    SELECT e.description FROM {{ exif }} e
    WHERE octet_length(e.description) BETWEEN 1 AND 400
    GROUP BY 1
    HAVING count(*) > %(many)s AND NOT {{ replaceable() }}
))
GROUP BY 1
HAVING {{ not_ours() }} > %(many)s
ORDER BY 2 DESC
LIMIT 3
{% endset %}


-- ------------------------------------------------------------------------------
-- What is written
-- ------------------------------------------------------------------------------

-- `photo` is the table or subquery that has the id.
{% macro keep_note(photo) %}
INSERT INTO asset_metadata ("assetId", key, value)
SELECT id::uuid, %(key)s, %(note)s::jsonb FROM {{ photo }}
ON CONFLICT ("assetId", key) DO UPDATE SET value = excluded.value
{% endmacro %}

{% macro drop_note(photo) %}
DELETE FROM asset_metadata
WHERE key = %(key)s AND "assetId" IN (SELECT id FROM {{ photo }})
{% endmacro %}

-- Change a description, if it is still as listed, together with its note: both or neither.
-- It is locked even when ours is taken back, as Immich may have written ours to the XMP file.
-- In a dry run, nothing is changed, which counts as written.
{% macro change(note) %}
{% if not writes %} SELECT true {% else %}
WITH written AS (
    UPDATE {{ exif }} e SET description = %(text)s
    {% if locks %}
    , "lockedProperties" = (
        SELECT array_agg(DISTINCT p)
        FROM unnest(coalesce(e."lockedProperties", '{}') || ARRAY['description']::varchar[]) p
    )
    {% endif %}
    FROM {{ asset }} a
    JOIN asset_job_status j ON j."assetId" = a.id
    WHERE e."assetId" = %(id)s::uuid AND a.id = e."assetId"
      AND {{ live() }} AND {{ extracted() }}
      AND coalesce(e.description, '') = %(listed)s
    RETURNING a.id
)
{% if notes %}, kept AS ({{ note }}) {% endif %}
SELECT id FROM written
{% endif %}
{% endmacro %}

-- id, text, listed, note → a row if the description was written. The second deletes the note.
{% set write = change(keep_note('written')) %}
{% set forget = change(drop_note('written')) %}

-- id, note
{% set remember %}
{% if notes %} {{ keep_note('(SELECT %(id)s AS id) one') }} {% else %} SELECT {% endif %}
{% endset %}


-- ------------------------------------------------------------------------------
-- The server, and what it allows us to do
-- ------------------------------------------------------------------------------

-- id → whether we got the photo's advisory lock, which ends with the connection. Its key is two
-- numbers, as Immich's own locks have one; the first number marks the lock as ours.
{% set claim %}
SELECT {% if writes %} pg_try_advisory_lock(1229802817, hashtext(%(id)s)) {% else %} true {% endif %}
{% endset %}
{% set release %}
SELECT {% if writes %} pg_advisory_unlock(1229802817, hashtext(%(id)s)) {% else %} true {% endif %}
{% endset %}

-- Immich's address for people, where its administrator has set one and we may read it.
{% set site %}
SELECT {% if 'system_metadata' in tables %} (
    SELECT value #>> '{server,externalDomain}' FROM system_metadata WHERE key = 'system-config'
) {% else %} NULL {% endif %}
{% endset %}

{% set clock %}
SELECT clock_timestamp()
{% endset %}

-- Whether the server is read-only, and the paths of some previews, to check the folder.
{% set check %}
SELECT {% if writes %} current_setting('transaction_read_only') {% else %} 'off' {% endif %},
    ARRAY(SELECT path FROM {{ file }} WHERE type = 'preview' LIMIT 50)
{% endset %}

-- For --check: the role; Immich's version, if the role may read it; how many photos there are, with
-- a description, with ours, and to be described; and ids and paths of previews to try.
{% set about %}
SELECT jsonb_build_object(
    'role', current_user,
    {% if 'version_history' in tables %}
    'version', (SELECT version FROM version_history ORDER BY "createdAt" DESC LIMIT 1),
    {% endif %}
    'notes', {{ notes | lower }},
    'locks', {{ locks | lower }},
    'photos', count(*),
    'described', count(*) FILTER (WHERE NOT {{ empty() }}),
    'ours', count(*) FILTER (WHERE {{ ours() }}),
    'left', count(*) FILTER (WHERE {{ due() }}),
    'samples', (
        SELECT coalesce(jsonb_agg(p), '[]') FROM (
            SELECT jsonb_build_array(a.id, f.path) AS p
            {{ source() }}
            WHERE {{ live() }} AND {{ ready() }} AND {{ chosen() }}
            LIMIT 5
        ) found
    )
)
{{ source() }}
WHERE {{ live() }} AND {{ chosen() }}
{% endset %}

-- How many connections are free besides this one.
{% set spare %}
SELECT least(
    current_setting('max_connections')::int
        - current_setting('superuser_reserved_connections')::int - count(*),
    nullif(rolconnlimit, -1) - count(*) FILTER (WHERE usename = rolname),
    nullif(datconnlimit, -1) - count(*) FILTER (WHERE s.datname = d.datname)
)
FROM pg_stat_activity s, pg_roles, pg_database d
WHERE datid IS NOT NULL AND rolname = session_user AND d.datname = current_database()
GROUP BY rolconnlimit, datconnlimit
{% endset %}

-- Of each album the id, OWNER:NAME by the owner's name, the same by their e-mail address, and NAME.
{% set known_albums %}
SELECT b.id::text, u.name || ':' || b."albumName", u.email || ':' || b."albumName", b."albumName"
FROM {{ album }} b
JOIN "{{ user }}" u ON u.id = {% if 'ownerId' in tables.get(album, ()) %} b."ownerId" {% else %} (
    SELECT "userId" FROM {{ of_album }} WHERE "albumId" = b.id AND role = 'owner'
) {% endif %}
WHERE b."deletedAt" IS NULL
{% endset %}

-- The GRANTs that are missing. For --undo, a trigger inserts a row for each deleted note.
{% macro quoted(names) %} ARRAY['{{ names | join("', '") }}'] {% endmacro %}
{% set grants %}
SELECT format('GRANT SELECT%%s ON %%I TO %%I', CASE name WHEN '{{ user }}' THEN ' (id, name, email)' END,
              name, current_user)
FROM unnest({{ quoted(needed + also_read) }}) name
WHERE NOT has_any_column_privilege(name, 'SELECT')
{% if writes %}
UNION ALL
SELECT format('GRANT UPDATE (%%I) ON {{ exif }} TO %%I', name, current_user)
FROM unnest({{ quoted(['description'] + ['lockedProperties'] * locks) }}) name
WHERE NOT has_column_privilege('{{ exif }}', name, 'UPDATE')
{% endif %}
{% if notes %}
UNION ALL
SELECT format('GRANT %%s ON asset_metadata TO %%I', name, current_user)
FROM unnest({{ quoted(['SELECT'] + ['INSERT', 'UPDATE', 'DELETE'] * writes) }}) name
WHERE NOT has_table_privilege('asset_metadata', name)
UNION ALL
SELECT format('GRANT INSERT ON asset_metadata_audit TO %%I', current_user)
WHERE {{ config.undo and writes }} AND NOT has_table_privilege(to_regclass('asset_metadata_audit'), 'INSERT')
{% endif %}
{% endset %}
