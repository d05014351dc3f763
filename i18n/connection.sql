-- What each connection begins with. Its answer, all tables that are there and their columns, chooses
-- the statements of immich.sql.

SET lock_timeout = '10s';
SET statement_timeout = '5min';

SELECT c.relname, array_agg(a.attname::text)
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE pg_table_is_visible(c.oid) AND c.relkind IN ('r', 'p')
GROUP BY c.relname
