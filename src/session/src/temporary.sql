-- What is in the session's temporary schema, as the statements that make it again. Read with the
-- search path "pg_catalog, pg_temp", so that every other name comes out qualified.
--
-- Sections, each a query of its own: planning one large query takes a backend longer than all that
-- it reads. The first lists what there is; the others are asked for only where there is something
-- that they speak of. {relations}, {indexes}, {types}, {functions} and {statistics} are arrays of
-- OIDs. Objects are found by what depends on the schema, for which there is an index: thousands of
-- tables of other sessions cost nothing.
--
-- Rows of a section: step, OID (both for the order), kind, name, text. Kinds: x, what cannot be made
-- again; d, a statement; e, a table without a page (its name, and as it is written); t, a table
-- whose rows come here, with its columns; s, a sequence whose position is set here. Everything that
-- is not known to be made again by these statements is of kind x.

-- ## inventory: kind (of a relation or a type, f, x, or ?), OID, flags
SELECT c.relkind::text, c.oid::text, concat_ws(' ', CASE WHEN c.relhastriggers THEN 'triggers' END, CASE WHEN c.relhassubclass OR c.relispartition OR c.relkind = 'p' THEN 'inherits' END,
  CASE WHEN c.relkind = 'r' AND EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = c.oid) THEN 'inherits' END)
FROM pg_depend d JOIN pg_class c ON c.oid = d.objid
WHERE d.refclassid = 'pg_namespace'::regclass AND d.refobjid = pg_my_temp_schema() AND d.classid = 'pg_class'::regclass
UNION ALL SELECT 'i', i.indexrelid::text, '' FROM pg_depend d JOIN pg_index i ON i.indrelid = d.objid
WHERE d.refclassid = 'pg_namespace'::regclass AND d.refobjid = pg_my_temp_schema() AND d.classid = 'pg_class'::regclass
UNION ALL SELECT CASE d.classid WHEN 'pg_type'::regclass THEN 'T' WHEN 'pg_proc'::regclass THEN 'F' WHEN 'pg_statistic_ext'::regclass THEN 'E' ELSE '?' END, d.objid::text, ''
FROM pg_depend d WHERE d.refclassid = 'pg_namespace'::regclass AND d.refobjid = pg_my_temp_schema() AND d.classid <> 'pg_class'::regclass
AND NOT EXISTS (SELECT FROM pg_type t WHERE d.classid = 'pg_type'::regclass AND t.oid = d.objid AND t.typname = '_helios_mark')

-- ## relations
WITH c AS (SELECT c.*, 'pg_temp.' || quote_ident(relname) AS q FROM pg_class c WHERE oid = ANY ({relations} || {indexes})),
me AS (SELECT oid AS owner FROM pg_roles WHERE rolname = session_user)
SELECT 0, c.oid, 'x', CASE
   WHEN c.relkind NOT IN ('r','p','i','I','S','v') THEN 'its kind'
   WHEN c.relowner <> me.owner THEN 'its owner'
   WHEN c.relkind IN ('r','p') AND c.relhasrules THEN 'rules'
   WHEN c.relrowsecurity OR c.relforcerowsecurity THEN 'row security'
   WHEN c.reloftype <> 0 THEN 'a table of a type'
   WHEN c.relkind = 'r' AND c.relam <> (SELECT oid FROM pg_am WHERE amname = 'heap') THEN 'its access method'
   WHEN c.reltablespace <> 0 THEN 'its tablespace'
   WHEN c.relreplident NOT IN ('d','n') THEN 'its replica identity'
   WHEN c.reltoastrelid <> 0 AND EXISTS (SELECT FROM pg_class toast WHERE toast.oid = c.reltoastrelid AND toast.reloptions IS NOT NULL) THEN 'options of its TOAST table'
   WHEN c.relacl IS NOT NULL AND (c.relkind NOT IN ('r','p','v','S') OR (SELECT NOT coalesce(bool_or(NOT a.is_grantable) AND count(*) = (SELECT count(*) FROM aclexplode(acldefault(CASE c.relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", c.relowner))), false) FROM aclexplode(c.relacl) a WHERE a.grantee = c.relowner)
     OR EXISTS (SELECT FROM aclexplode(c.relacl) a WHERE a.grantor <> c.relowner)) THEN 'privileges'
 END || ' of "' || c.relname || '"', '' FROM c, me
UNION ALL SELECT 12, c.oid, 'd', c.q, format('GRANT %s ON %s %s TO %s%s', a.privilege_type, CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, c.q, CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END, CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' END)
  FROM c, aclexplode(c.relacl) a WHERE c.relacl IS NOT NULL AND a.grantee <> c.relowner
UNION ALL SELECT 12, c.oid, 'd', c.q, format('COMMENT ON %s %s%s IS %L', CASE WHEN d.objsubid > 0 THEN 'COLUMN' ELSE CASE c.relkind WHEN 'v' THEN 'VIEW' WHEN 'S' THEN 'SEQUENCE' WHEN 'i' THEN 'INDEX' WHEN 'I' THEN 'INDEX' ELSE 'TABLE' END END, c.q, (SELECT '.' || quote_ident(attname) FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum = d.objsubid AND d.objsubid > 0), d.description)
  FROM c JOIN pg_description d ON d.objoid = c.oid AND d.classoid = 'pg_class'::regclass
UNION ALL SELECT 0, d.objoid, 'x', 'a comment', '' FROM pg_description d WHERE d.objoid = ANY ({types} || {functions} || {statistics}) AND d.classoid IN ('pg_type'::regclass, 'pg_proc'::regclass, 'pg_statistic_ext'::regclass)

-- ## tables
WITH c AS (SELECT c.*, 'pg_temp.' || quote_ident(relname) AS q FROM pg_class c WHERE oid = ANY ({relations}) AND relkind IN ('r','p')),
col AS (SELECT c.oid, c.q AS t, a.attnum, a.attname, quote_ident(a.attname) AS q, a.attgenerated, a.attislocal, a.attstorage, a.attstattarget, a.attoptions, t.typstorage,
  concat_ws(' ', quote_ident(a.attname), format_type(a.atttypid, a.atttypmod),
   (SELECT format('COLLATE %I.%I', n.nspname, o.collname) FROM pg_collation o JOIN pg_namespace n ON n.oid = o.collnamespace WHERE o.oid = a.attcollation AND a.attcollation <> t.typcollation),
   CASE a.attcompression WHEN 'p' THEN 'COMPRESSION pglz' WHEN 'l' THEN 'COMPRESSION lz4' END,
   CASE a.attgenerated WHEN 's' THEN format('GENERATED ALWAYS AS (%s) STORED', pg_get_expr(ad.adbin, ad.adrelid)) WHEN '' THEN 'DEFAULT ' || pg_get_expr(ad.adbin, ad.adrelid) END,
   CASE WHEN a.attnotnull AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype = 'n' AND k.conkey = ARRAY[a.attnum]) THEN 'NOT NULL' END) AS def,
  a.attacl IS NOT NULL OR a.attgenerated NOT IN ('', 's') AS odd
  FROM c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped JOIN pg_type t ON t.oid = a.atttypid
  LEFT JOIN pg_attrdef ad ON a.atthasdef AND ad.adrelid = c.oid AND ad.adnum = a.attnum)
SELECT 0, oid, 'x', 'column "' || attname || '" of "' || t || '"', '' FROM col WHERE odd
UNION ALL SELECT 3, c.oid, 'd', c.q, concat(format('CREATE TABLE %s ', c.q),
   CASE WHEN c.relispartition THEN {partition} ELSE format('(%s)', (SELECT string_agg(part, ', ' ORDER BY n, m) FROM (SELECT 0, col.attnum::int8, col.def FROM col WHERE col.oid = c.oid AND col.attislocal
   UNION ALL SELECT 1, k.oid::int8, format('CONSTRAINT %I %s', k.conname, pg_get_constraintdef(k.oid)) FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype = 'n' AND k.conislocal) parts (n, m, part))) END,
   {parents}, CASE c.relkind WHEN 'p' THEN ' PARTITION BY ' || pg_get_partkeydef(c.oid) ELSE ' USING heap' END, ' WITH (' || array_to_string(c.reloptions, ', ') || ')') FROM c
UNION ALL SELECT 4, oid, 'd', t, format('ALTER TABLE ONLY %s ALTER %s SET STORAGE %s', t, q, CASE attstorage WHEN 'p' THEN 'PLAIN' WHEN 'e' THEN 'EXTERNAL' WHEN 'm' THEN 'MAIN' ELSE 'EXTENDED' END) FROM col WHERE attstorage <> typstorage
UNION ALL SELECT 4, oid, 'd', t, format('ALTER TABLE ONLY %s ALTER %s SET STATISTICS %s', t, q, attstattarget) FROM col WHERE attstattarget >= 0
UNION ALL SELECT 4, oid, 'd', t, format('ALTER TABLE ONLY %s ALTER %s SET (%s)', t, q, array_to_string(attoptions, ', ')) FROM col WHERE attoptions IS NOT NULL
UNION ALL SELECT 5, c.oid, 'e', c.relname, c.q FROM c WHERE relkind = 'p' OR pg_relation_size(c.oid) = 0
UNION ALL SELECT 6, c.oid, CASE WHEN f.list IS NULL AND pg_relation_size(c.oid) > 0 THEN 'x' ELSE 't' END, c.q, coalesce(f.list, '') FROM c, LATERAL (SELECT string_agg(col.q, ', ' ORDER BY attnum) AS list FROM col WHERE col.oid = c.oid AND col.attgenerated = '') f WHERE relkind = 'r'
UNION ALL SELECT 14, c.oid, 'd', c.q, format('ANALYZE %s', c.q) FROM c WHERE pg_stat_get_last_analyze_time(c.oid) IS NOT NULL OR (relkind = 'p' AND reltuples >= 0)

-- ## constraints
WITH c AS (SELECT c.oid, c.relname, c.relkind, c.relhassubclass, 'pg_temp.' || quote_ident(relname) AS q FROM pg_class c WHERE oid = ANY ({relations} || {indexes}))
SELECT CASE WHEN k.contype NOT IN ('p','u','c','x','f','n') OR (k.contype = 'f' AND (c.relkind = 'p' OR k.conparentid <> 0)) THEN 0 WHEN k.contype = 'f' THEN 10 ELSE 7 END, k.oid,
  CASE WHEN k.contype NOT IN ('p','u','c','x','f','n') OR (k.contype = 'f' AND (c.relkind = 'p' OR k.conparentid <> 0)) THEN 'x' ELSE 'd' END,
  'constraint "' || k.conname || '"',
  format('ALTER TABLE%s %s ADD CONSTRAINT %I %s', CASE WHEN k.contype <> 'c' OR k.connoinherit THEN ' ONLY' END, c.q, k.conname, pg_get_constraintdef(k.oid))
  FROM pg_constraint k JOIN c ON c.oid = k.conrelid WHERE k.contype <> 'n' AND (k.contype <> 'c' OR k.conislocal)
UNION ALL SELECT 12, k.oid, 'd', c.q, format('COMMENT ON CONSTRAINT %I ON %s IS %L', k.conname, c.q, d.description)
  FROM pg_constraint k JOIN c ON c.oid = k.conrelid JOIN pg_description d ON d.objoid = k.oid AND d.classoid = 'pg_constraint'::regclass
UNION ALL SELECT 8, i.indexrelid, 'd', c.q, pg_get_indexdef(i.indexrelid) FROM pg_index i JOIN c ON c.oid = i.indrelid WHERE NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid AND k.contype IN ('p','u','x'))
UNION ALL SELECT 9, x.oid, 'd', c.q, format('ALTER INDEX %s SET (%s)', c.q, array_to_string(x.reloptions, ', ')) FROM pg_class x JOIN c ON c.oid = x.oid WHERE c.relkind IN ('i','I') AND x.reloptions IS NOT NULL AND EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = x.oid AND k.contype IN ('p','u','x'))
UNION ALL SELECT 9, i.indexrelid, 'd', t.q, format('ALTER TABLE %s CLUSTER ON %I', t.q, c.relname) FROM pg_index i JOIN c ON c.oid = i.indexrelid JOIN c t ON t.oid = i.indrelid WHERE i.indisclustered
UNION ALL SELECT 0, i.indexrelid, 'x', 'an index of "' || t.relname || '"', '' FROM pg_index i JOIN c t ON t.oid = i.indrelid WHERE NOT i.indisvalid OR NOT i.indisready OR i.indisreplident

-- ## inheritance
WITH c AS (SELECT c.*, 'pg_temp.' || quote_ident(relname) AS q FROM pg_class c WHERE oid = ANY ({relations} || {indexes})),
pair AS (SELECT i.inhrelid AS child, i.inhparent AS parent, c.q, c.relname, c.relkind, c.relispartition FROM pg_inherits i JOIN c ON c.oid = i.inhrelid),
col AS (SELECT a.attrelid, a.attname, a.attnum, a.attislocal, a.attnotnull, a.attgenerated, a.attidentity, pg_get_expr(ad.adbin, ad.adrelid) AS def, row_number() OVER (PARTITION BY attrelid ORDER BY attnum) AS n
  FROM pg_attribute a LEFT JOIN pg_attrdef ad ON ad.adrelid = a.attrelid AND ad.adnum = a.attnum WHERE a.attnum > 0 AND NOT a.attisdropped AND a.attrelid IN (SELECT child FROM pair WHERE relkind IN ('r','p') UNION SELECT parent FROM pair WHERE relkind IN ('r','p')))
SELECT 0, pair.child, 'x', 'inheritance of "' || pair.relname || '"', '' FROM pair WHERE pair.relkind IN ('r','p')
  AND ((SELECT count(*) FROM pg_inherits i WHERE i.inhrelid = pair.child) > 1 OR EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = pair.child AND i.inhdetachpending) OR pair.parent > pair.child
   OR EXISTS (SELECT FROM col p LEFT JOIN col k ON k.attrelid = pair.child AND k.n = p.n WHERE p.attrelid = pair.parent AND (k.attname IS DISTINCT FROM p.attname OR k.attislocal OR k.attgenerated <> p.attgenerated OR (p.attgenerated <> '' AND k.def IS DISTINCT FROM p.def) OR p.attidentity <> '' OR k.attidentity <> ''))
   OR (SELECT count(*) FROM col k WHERE k.attrelid = pair.child AND NOT k.attislocal) <> (SELECT count(*) FROM col p WHERE p.attrelid = pair.parent))
UNION ALL SELECT 4, pair.child, 'd', pair.q, format('ALTER TABLE ONLY %s ALTER %I %s', pair.q, k.attname, coalesce('SET DEFAULT ' || k.def, 'DROP DEFAULT'))
  FROM pair JOIN col k ON k.attrelid = pair.child JOIN col p ON p.attrelid = pair.parent AND p.attname = k.attname WHERE NOT k.attislocal AND k.attgenerated = '' AND k.def IS DISTINCT FROM p.def
UNION ALL SELECT 4, pair.child, 'd', pair.q, format('ALTER TABLE ONLY %s ALTER %I SET NOT NULL', pair.q, k.attname)
  FROM pair JOIN col k ON k.attrelid = pair.child JOIN col p ON p.attrelid = pair.parent AND p.attname = k.attname WHERE NOT k.attislocal AND k.attnotnull AND NOT p.attnotnull AND NOT EXISTS (SELECT FROM pg_constraint n WHERE n.conrelid = pair.child AND n.contype IN ('n','p') AND n.conkey @> ARRAY[k.attnum])
UNION ALL SELECT 9, pair.child, 'd', pair.q, format('ALTER INDEX %s ATTACH PARTITION %s', p.q, pair.q) FROM pair JOIN c p ON p.oid = pair.parent WHERE pair.relkind IN ('i','I')

-- ## triggers
SELECT CASE WHEN t.tgenabled <> 'O' OR t.tgparentid <> 0 THEN 0 ELSE 13 END, t.oid, CASE WHEN t.tgenabled <> 'O' OR t.tgparentid <> 0 THEN 'x' ELSE 'd' END, 'trigger "' || t.tgname || '"', pg_get_triggerdef(t.oid)
FROM pg_trigger t WHERE t.tgrelid = ANY ({relations}) AND (NOT t.tgisinternal OR t.tgenabled <> 'O')

-- ## sequences
WITH c AS (SELECT c.*, 'pg_temp.' || quote_ident(relname) AS q FROM pg_class c WHERE oid = ANY ({relations})),
seq AS (SELECT c.oid, c.q, format('AS %s START WITH %s INCREMENT BY %s MINVALUE %s MAXVALUE %s CACHE %s%s', format_type(s.seqtypid, NULL), seqstart, seqincrement, seqmin, seqmax, seqcache, CASE WHEN seqcycle THEN ' CYCLE' ELSE '' END) AS options, d.deptype, d.refobjid, a.attidentity, quote_ident(a.attname) AS col
  FROM pg_sequence s JOIN c ON c.oid = s.seqrelid LEFT JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a','i')
  LEFT JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid)
SELECT 2, oid, 'd', q, format('CREATE SEQUENCE %s %s', q, options) FROM seq WHERE deptype IS DISTINCT FROM 'i'
UNION ALL SELECT 4, seq.oid, 'd', t.q, format('ALTER TABLE ONLY %s ALTER %s ADD GENERATED %s AS IDENTITY (SEQUENCE NAME %s %s)', t.q, seq.col, CASE seq.attidentity WHEN 'a' THEN 'ALWAYS' ELSE 'BY DEFAULT' END, seq.q, regexp_replace(seq.options, '^AS \S+', '')) FROM seq JOIN c t ON t.oid = seq.refobjid WHERE deptype = 'i'
UNION ALL SELECT 5, seq.oid, 'd', seq.q, format('ALTER SEQUENCE %s OWNED BY %s.%s', seq.q, t.q, seq.col) FROM seq JOIN c t ON t.oid = seq.refobjid WHERE deptype = 'a'
UNION ALL SELECT 15, oid, 's', q, '' FROM seq

-- ## views
WITH c AS (SELECT c.*, 'pg_temp.' || quote_ident(relname) AS q FROM pg_class c WHERE oid = ANY ({relations}) AND relkind = 'v')
SELECT 0, c.oid, 'x', 'rules of "' || c.relname || '"', '' FROM c WHERE (SELECT count(*) FROM pg_rewrite r WHERE r.ev_class = c.oid) <> 1
UNION ALL SELECT 11, c.oid, 'd', c.q, format('CREATE VIEW %s%s AS %s', c.q, ' WITH (' || array_to_string(c.reloptions, ', ') || ')', pg_get_viewdef(c.oid)) FROM c
UNION ALL SELECT 11, c.oid, 'd', c.q, format('ALTER VIEW %s ALTER %I SET DEFAULT %s', c.q, a.attname, pg_get_expr(ad.adbin, ad.adrelid)) FROM c JOIN pg_attrdef ad ON ad.adrelid = c.oid JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = ad.adnum

-- ## types
WITH t AS (SELECT t.*, 'pg_temp.' || quote_ident(typname) AS q FROM pg_type t WHERE oid = ANY ({types})),
me AS (SELECT oid AS owner FROM pg_roles WHERE rolname = session_user)
SELECT 0, t.oid, 'x', 'type "' || t.typname || '"', '' FROM t, me WHERE t.typtype NOT IN ('e','c','d') OR t.typowner <> me.owner OR t.typacl IS NOT NULL
  OR EXISTS (SELECT FROM pg_constraint k WHERE k.contypid = t.oid AND k.contype NOT IN ('c','n')) OR (t.typtype = 'c' AND EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND (a.attoptions IS NOT NULL OR a.attstattarget >= 0)))
UNION ALL SELECT 1, t.oid, 'd', t.q, format('CREATE TYPE %s AS ENUM (%s)', t.q, (SELECT string_agg(quote_literal(enumlabel), ', ' ORDER BY enumsortorder) FROM pg_enum e WHERE e.enumtypid = t.oid)) FROM t WHERE typtype = 'e'
UNION ALL SELECT 3, t.oid, 'd', t.q, format('CREATE TYPE %s AS (%s)', t.q, (SELECT string_agg(concat_ws(' ', quote_ident(a.attname), format_type(a.atttypid, a.atttypmod), (SELECT format('COLLATE %I.%I', n.nspname, o.collname) FROM pg_type b JOIN pg_collation o ON o.oid = a.attcollation JOIN pg_namespace n ON n.oid = o.collnamespace WHERE b.oid = a.atttypid AND a.attcollation <> b.typcollation)), ', ' ORDER BY attnum) FROM pg_attribute a WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped)) FROM t WHERE typtype = 'c'
UNION ALL SELECT 3, t.oid, 'd', t.q, concat_ws(' ', format('CREATE DOMAIN %s AS %s', t.q, format_type(t.typbasetype, t.typtypmod)),
   (SELECT format('COLLATE %I.%I', n.nspname, o.collname) FROM pg_type b JOIN pg_collation o ON o.oid = t.typcollation JOIN pg_namespace n ON n.oid = o.collnamespace WHERE b.oid = t.typbasetype AND t.typcollation <> b.typcollation),
   'DEFAULT ' || coalesce(pg_get_expr(t.typdefaultbin, 0), quote_literal(t.typdefault)), CASE WHEN t.typnotnull AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.contypid = t.oid AND k.contype = 'n') THEN 'NOT NULL' END,
   (SELECT string_agg(format('CONSTRAINT %I %s', k.conname, pg_get_constraintdef(k.oid)), ' ' ORDER BY k.oid) FROM pg_constraint k WHERE k.contypid = t.oid AND k.convalidated),
   '') FROM t WHERE typtype = 'd'
UNION ALL SELECT 3, t.oid, 'd', t.q, format('ALTER DOMAIN %s ADD CONSTRAINT %I %s', t.q, k.conname, pg_get_constraintdef(k.oid)) FROM t JOIN pg_constraint k ON k.contypid = t.oid WHERE typtype = 'd' AND NOT k.convalidated

-- ## functions
SELECT CASE WHEN p.prokind NOT IN ('f','p') OR p.proowner <> me.owner OR p.proacl IS NOT NULL THEN 0 ELSE 3 END, p.oid, CASE WHEN p.prokind NOT IN ('f','p') OR p.proowner <> me.owner OR p.proacl IS NOT NULL THEN 'x' ELSE 'd' END, 'function "' || p.proname || '"',
  CASE WHEN p.prokind IN ('f','p') THEN pg_get_functiondef(p.oid) ELSE '' END
FROM pg_proc p, (SELECT oid AS owner FROM pg_roles WHERE rolname = session_user) me WHERE p.oid = ANY ({functions})

-- ## statistics
SELECT 9, e.oid, 'd', e.stxname, pg_get_statisticsobjdef(e.oid) FROM pg_statistic_ext e WHERE e.oid = ANY ({statistics})
UNION ALL SELECT 9, e.oid, 'd', e.stxname, format('ALTER STATISTICS pg_temp.%I SET STATISTICS %s', e.stxname, e.stxstattarget) FROM pg_statistic_ext e WHERE e.oid = ANY ({statistics}) AND e.stxstattarget >= 0

-- ## order
WITH dep AS (SELECT coalesce(ad.adrelid, r.ev_class, nullif(k.contypid, 0), CASE WHEN k.oid IS NULL THEN d.objid END) AS needs,
   coalesce(nullif(t.typrelid, 0), nullif(el.typrelid, 0), el.oid, d.refobjid) AS needed, d.refclassid
  FROM pg_depend d LEFT JOIN pg_attrdef ad ON d.classid = 'pg_attrdef'::regclass AND ad.oid = d.objid LEFT JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
  LEFT JOIN pg_constraint k ON d.classid = 'pg_constraint'::regclass AND k.oid = d.objid
  LEFT JOIN pg_type t ON d.refclassid = 'pg_type'::regclass AND t.oid = d.refobjid LEFT JOIN pg_type el ON t.typelem <> 0 AND t.typcategory = 'A' AND el.oid = t.typelem
  WHERE d.refobjid = ANY (SELECT unnest({relations} || {types} || {functions}) UNION ALL SELECT oid FROM pg_type y WHERE y.typrelid = ANY ({relations}) OR y.typelem = ANY ({types}) OR y.typelem IN (SELECT z.oid FROM pg_type z WHERE z.typrelid = ANY ({relations})))
  AND d.refclassid IN ('pg_class'::regclass, 'pg_type'::regclass, 'pg_proc'::regclass) AND d.deptype = 'n'),
known AS (SELECT oid, relkind = 'v' AS late, relname AS name FROM pg_class WHERE oid = ANY ({relations}) AND relkind IN ('r','p','v')
  UNION ALL SELECT CASE typtype WHEN 'c' THEN typrelid ELSE oid END, false, typname FROM pg_type WHERE oid = ANY ({types}) AND typtype <> 'e' UNION ALL SELECT oid, false, proname FROM pg_proc WHERE oid = ANY ({functions}))
SELECT DISTINCT 0, 0::oid, 'x', 'the order of "' || a.name || '" and "' || b.name || '"', '' FROM dep JOIN known a ON a.oid = dep.needs JOIN known b ON b.oid = dep.needed
WHERE a.oid <> b.oid AND ((b.late AND NOT a.late) OR (a.late = b.late AND b.oid > a.oid))

-- ## partition: a part of the section of tables, where some are heirs
format('PARTITION OF %s %s', (SELECT CASE p.relnamespace WHEN pg_my_temp_schema() THEN 'pg_temp' ELSE quote_ident((SELECT nspname FROM pg_namespace n WHERE n.oid = p.relnamespace)) END || '.' || quote_ident(p.relname) FROM pg_inherits i JOIN pg_class p ON p.oid = i.inhparent WHERE i.inhrelid = c.oid), pg_get_expr(c.relpartbound, c.oid))

-- ## parents: another one
CASE WHEN NOT c.relispartition THEN ' INHERITS (' || (SELECT string_agg(CASE p.relnamespace WHEN pg_my_temp_schema() THEN 'pg_temp' ELSE quote_ident((SELECT nspname FROM pg_namespace n WHERE n.oid = p.relnamespace)) END || '.' || quote_ident(p.relname), ', ' ORDER BY inhseqno) FROM pg_inherits i JOIN pg_class p ON p.oid = i.inhparent WHERE i.inhrelid = c.oid) || ')' END
