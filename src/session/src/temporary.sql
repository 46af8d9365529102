-- What is in the session's temporary schema, as the statements that make it again: rows of kind,
-- name and text, in the order in which they are to be run. Read with the search path
-- "pg_catalog, pg_temp", so that every other name comes out qualified.
--
-- Kinds: x, what cannot be made again; d, a statement; e, a table without a page (its name, and as
-- it is written); t, a table whose rows come here, with its columns; s, a sequence whose position
-- is set here. Everything that is not known to be made again by these statements is of kind x.
WITH me AS (SELECT pg_my_temp_schema() AS ns, (SELECT oid FROM pg_roles WHERE rolname = session_user) AS owner),
c AS (SELECT c.*, 'pg_temp.' || quote_ident(relname) AS q FROM pg_class c, me WHERE relnamespace = me.ns),
bad (why) AS (
 SELECT CASE
   WHEN c.relkind NOT IN ('r','i','S','v') THEN 'its kind'
   WHEN c.relowner <> me.owner THEN 'its owner'
   WHEN c.relispartition OR c.relhassubclass OR EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = c.oid) THEN 'inheritance'
   WHEN c.relhastriggers THEN 'triggers or foreign keys'
   WHEN c.relkind = 'r' AND c.relhasrules THEN 'rules'
   WHEN c.relkind = 'v' AND (SELECT count(*) FROM pg_rewrite r WHERE r.ev_class = c.oid) <> 1 THEN 'rules'
   WHEN c.relkind = 'v' AND EXISTS (SELECT FROM pg_attrdef d WHERE d.adrelid = c.oid) THEN 'defaults of a view'
   WHEN c.relkind = 'v' AND c.reloptions IS NOT NULL THEN 'options of a view'
   WHEN c.relrowsecurity OR c.relforcerowsecurity THEN 'row security'
   WHEN c.reloftype <> 0 THEN 'a table of a type'
   WHEN c.relkind = 'r' AND c.relam <> (SELECT oid FROM pg_am WHERE amname = 'heap') THEN 'its access method'
   WHEN c.reltablespace <> 0 THEN 'its tablespace'
   WHEN c.relacl IS NOT NULL THEN 'privileges'
   WHEN c.relreplident NOT IN ('d','n') THEN 'its replica identity'
   WHEN c.relkind = 'i' AND EXISTS (SELECT FROM pg_index i WHERE i.indexrelid = c.oid AND (NOT i.indisvalid OR NOT i.indisready OR i.indisclustered OR i.indisexclusion)) THEN 'an index'
   WHEN c.relkind = 'i' AND c.reloptions IS NOT NULL AND EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = c.oid) THEN 'options of an index'
   WHEN EXISTS (SELECT FROM pg_class toast WHERE toast.oid = c.reltoastrelid AND toast.reloptions IS NOT NULL) THEN 'options of its TOAST table'
 END || ' of "' || c.relname || '"' FROM c, me
 UNION ALL SELECT 'column "' || a.attname || '" of "' || c.relname || '"' FROM pg_attribute a JOIN c ON c.oid = a.attrelid JOIN pg_type t ON t.oid = a.atttypid, me
   WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind = 'r'
   AND (a.attacl IS NOT NULL OR a.attoptions IS NOT NULL OR a.attstattarget >= 0 OR a.attstorage <> t.typstorage OR t.typnamespace = me.ns OR a.attgenerated NOT IN ('', 's') OR NOT a.attislocal)
 UNION ALL SELECT 'constraint "' || k.conname || '"' FROM pg_constraint k JOIN c ON c.oid = k.conrelid WHERE k.contype NOT IN ('p','u','c','n') OR k.condeferrable OR NOT k.convalidated
 UNION ALL SELECT 'type "' || t.typname || '"' FROM pg_type t, me WHERE t.typnamespace = me.ns
   AND NOT EXISTS (SELECT FROM c WHERE c.relkind IN ('r','v','S') AND (c.reltype = t.oid OR c.reltype = t.typelem))
 UNION ALL SELECT 'function "' || p.proname || '"' FROM pg_proc p, me WHERE p.pronamespace = me.ns
 UNION ALL SELECT 'another object' FROM pg_depend d, me WHERE d.refclassid = 'pg_namespace'::regclass AND d.refobjid = me.ns AND d.classid NOT IN ('pg_class'::regclass, 'pg_type'::regclass, 'pg_proc'::regclass)
 UNION ALL SELECT 'a comment' FROM pg_description d JOIN c ON c.oid = d.objoid WHERE d.classoid = 'pg_class'::regclass
 UNION ALL SELECT 'extended statistics' FROM pg_statistic_ext e JOIN c ON c.oid = e.stxrelid
),
identity (seq, col, num) AS (SELECT d.objid, d.refobjid, d.refobjsubid FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.deptype = 'i' AND d.objid IN (SELECT oid FROM c WHERE relkind = 'S')),
seq AS (SELECT c.oid, c.q, format('AS %s START WITH %s INCREMENT BY %s MINVALUE %s MAXVALUE %s CACHE %s%s', format_type(s.seqtypid, NULL), seqstart, seqincrement, seqmin, seqmax, seqcache, CASE WHEN seqcycle THEN ' CYCLE' ELSE '' END) AS options
  FROM pg_sequence s JOIN c ON c.oid = s.seqrelid),
col AS (SELECT c.oid, a.attnum, a.attname, quote_ident(a.attname) AS q, a.attgenerated, a.attidentity,
  concat_ws(' ', quote_ident(a.attname), format_type(a.atttypid, a.atttypmod),
   (SELECT format('COLLATE %I.%I', n.nspname, o.collname) FROM pg_collation o JOIN pg_namespace n ON n.oid = o.collnamespace WHERE o.oid = a.attcollation AND a.attcollation <> t.typcollation),
   CASE a.attcompression WHEN 'p' THEN 'COMPRESSION pglz' WHEN 'l' THEN 'COMPRESSION lz4' END,
   CASE a.attgenerated WHEN 's' THEN format('GENERATED ALWAYS AS (%s) STORED', pg_get_expr(ad.adbin, ad.adrelid)) WHEN '' THEN 'DEFAULT ' || pg_get_expr(ad.adbin, ad.adrelid) END,
   CASE WHEN a.attidentity <> '' THEN (SELECT format('GENERATED %s AS IDENTITY (SEQUENCE NAME %s %s)', CASE a.attidentity WHEN 'a' THEN 'ALWAYS' ELSE 'BY DEFAULT' END, seq.q, regexp_replace(seq.options, '^AS \S+', '')) FROM identity i JOIN seq ON seq.oid = i.seq WHERE i.col = c.oid AND i.num = a.attnum) END,
   CASE WHEN a.attnotnull AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype = 'n' AND k.conkey = ARRAY[a.attnum]) THEN 'NOT NULL' END) AS def
  FROM c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped JOIN pg_type t ON t.oid = a.atttypid
  LEFT JOIN pg_attrdef ad ON ad.adrelid = c.oid AND ad.adnum = a.attnum WHERE c.relkind = 'r'),
rows (step, at, kind, name, sql) AS (
 SELECT 0, 0::oid, 'x', why, '' FROM bad WHERE why IS NOT NULL
 UNION ALL SELECT 1, oid, 'd', q, format('CREATE SEQUENCE %s %s', q, options) FROM seq WHERE oid NOT IN (SELECT i.seq FROM identity i)
 UNION ALL SELECT 2, c.oid, 'd', c.q, format('CREATE TABLE %s (%s) USING heap%s', c.q, (SELECT string_agg(part, ', ' ORDER BY n, m) FROM (SELECT 0, col.attnum::int8, col.def FROM col WHERE col.oid = c.oid
   UNION ALL SELECT 1, k.oid::int8, format('CONSTRAINT %I %s', k.conname, pg_get_constraintdef(k.oid)) FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype = 'n') parts (n, m, part)), ' WITH (' || array_to_string(c.reloptions, ', ') || ')') FROM c WHERE relkind = 'r'
 UNION ALL SELECT 3, d.objid, 'd', s.q, format('ALTER SEQUENCE %s OWNED BY %s.%s', s.q, c.q, col.q) FROM pg_depend d JOIN c s ON s.oid = d.objid JOIN c ON c.oid = d.refobjid JOIN col ON col.oid = c.oid AND col.attnum = d.refobjsubid WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.deptype = 'a' AND s.relkind = 'S'
 UNION ALL SELECT 4, c.oid, 'e', c.relname, c.q FROM c WHERE relkind = 'r' AND pg_relation_size(c.oid) = 0
 UNION ALL SELECT 4, c.oid, 't', c.q, (SELECT string_agg(col.q, ', ' ORDER BY attnum) FROM col WHERE col.oid = c.oid AND col.attgenerated = '') FROM c WHERE relkind = 'r'
 UNION ALL SELECT 5, k.oid, 'd', c.q, format('ALTER TABLE ONLY %s ADD CONSTRAINT %I %s', c.q, k.conname, pg_get_constraintdef(k.oid)) FROM pg_constraint k JOIN c ON c.oid = k.conrelid WHERE k.contype IN ('p','u','c')
 UNION ALL SELECT 6, i.indexrelid, 'd', c.q, pg_get_indexdef(i.indexrelid) FROM pg_index i JOIN c ON c.oid = i.indrelid WHERE NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid)
 UNION ALL SELECT 7, c.oid, 'd', c.q, format('CREATE VIEW %s AS %s', c.q, pg_get_viewdef(c.oid)) FROM c WHERE relkind = 'v'
 UNION ALL SELECT 8, c.oid, 's', c.q, '' FROM c WHERE relkind = 'S'
 UNION ALL SELECT 9, c.oid, 'd', c.q, format('ANALYZE %s', c.q) FROM c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE relkind = 'r'
   AND EXISTS (SELECT FROM pg_stats st WHERE st.schemaname = n.nspname AND st.tablename = c.relname)
)
SELECT kind, name, sql FROM rows ORDER BY step, at
