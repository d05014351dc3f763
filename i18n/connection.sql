-- What each connection begins with. Its answer, all tables that are there and their columns, chooses
-- the statements of immich.sql. Immich's version and settings are optional: not every role may read
-- these tables.

SET lock_timeout = '10s';
SET statement_timeout = '5min';

SELECT c.relname, ARRAY(
    SELECT attname::text FROM pg_catalog.pg_attribute
    WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped
)
FROM pg_catalog.pg_class c
WHERE c.relnamespace <> 'pg_catalog'::regnamespace AND pg_table_is_visible(c.oid)
    AND c.relkind IN ('r', 'p')
    AND (c.relname NOT IN ('system_metadata', 'version_history') OR has_table_privilege(c.oid, 'SELECT'))
