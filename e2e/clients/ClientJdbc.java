import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.io.StringReader;
import java.io.StringWriter;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Savepoint;
import java.sql.Statement;
import java.util.HashSet;
import java.util.Objects;
import java.util.Properties;
import java.util.Set;
import org.postgresql.PGConnection;
import org.postgresql.copy.CopyManager;

/** JDBC: prepared statements, batches, a fetchSize cursor on a portal, CopyManager, savepoints. */
public final class ClientJdbc {
    private static final BufferedReader INPUT =
            new BufferedReader(new InputStreamReader(System.in));

    private static void check(String what, Object got, Object expected) {
        if (!Objects.equals(got, expected)) {
            throw new IllegalStateException(what + ": got " + got + ", expected " + expected);
        }
    }

    private static void switchNow() throws Exception {
        System.out.println("SWITCH");
        System.out.flush();
        check("answer", INPUT.readLine(), "GO");
    }

    private static Connection connect() throws SQLException {
        Properties properties = new Properties();
        properties.setProperty("user", System.getenv("PGUSER"));
        String password = System.getenv("PGPASSWORD");
        properties.setProperty("password", password == null ? "" : password);
        // Named statements from the first execution on.
        properties.setProperty("prepareThreshold", "1");
        String url = "jdbc:postgresql://" + System.getenv("PGHOST") + ":"
                + System.getenv("PGPORT") + "/" + System.getenv("PGDATABASE");
        return DriverManager.getConnection(url, properties);
    }

    private static void mistake(Connection conn) throws SQLException {
        Savepoint before = conn.setSavepoint();
        try (Statement statement = conn.createStatement()) {
            statement.execute("insert into jd (v) values ('batch 1')");
            throw new IllegalStateException("a duplicate key was accepted");
        } catch (SQLException e) {
            check("SQLSTATE", e.getSQLState(), "23505");
            conn.rollback(before);
        }
    }

    /** Returns the id that the row was given. */
    private static int add(PreparedStatement add, String v, int n) throws SQLException {
        add.setString(1, v);
        add.setInt(2, n);
        check(v, add.executeUpdate(), 1);
        try (ResultSet keys = add.getGeneratedKeys()) {
            check("a generated key", keys.next(), true);
            return keys.getInt(1);
        }
    }

    /** Returns the ids that the program saw: of the first row and of the last. */
    private static int[] transaction(Connection conn) throws Exception {
        conn.setAutoCommit(false);
        String insert = "insert into jd (v, n) values (?, ?)";
        int[] seen = new int[2];
        try (PreparedStatement add = conn.prepareStatement(insert);
                PreparedStatement one = conn.prepareStatement(insert, new String[] {"id"})) {
            seen[0] = add(one, "first", 0);
            check("first id", seen[0], 1);
            for (int i = 1; i <= 200; i++) {
                add.setString(1, "batch " + i);
                add.setInt(2, i);
                add.addBatch();
            }
            check("batch", add.executeBatch().length, 200);
            CopyManager copy = conn.unwrap(PGConnection.class).getCopyAPI();
            StringBuilder rows = new StringBuilder();
            for (int i = 201; i <= 400; i++) {
                rows.append("copied ").append(i).append('\t').append(i).append('\n');
            }
            check("copied", copy.copyIn("copy jd (v, n) from stdin", new StringReader(rows.toString())), 200L);
            mistake(conn);
            walk(conn);
            seen[1] = add(one, "late", 401);
        }
        conn.commit();
        conn.setAutoCommit(true);
        return seen;
    }

    private static void contents(Statement statement, int[] seen) throws SQLException {
        Set<Integer> ids = new HashSet<>();
        try (ResultSet rows = statement.executeQuery("select n, v, id from jd order by n")) {
            for (int n = 0; n <= 401; n++) {
                String v = n == 0 ? "first" : n <= 200 ? "batch " + n : n <= 400 ? "copied " + n : "late";
                check("row", rows.next() ? rows.getInt(1) : -1, n);
                check("row " + n, rows.getString(2), v);
                check("unique id of row " + n, ids.add(rows.getInt(3)), true);
                if (n == 0 || n == 401) {
                    check("id of row " + n, rows.getInt(3), seen[n == 0 ? 0 : 1]);
                }
            }
            check("end of rows", rows.next(), false);
        }
    }

    private static void walk(Connection conn) throws Exception {
        try (PreparedStatement walk = conn.prepareStatement("select n from jd where n >= ? order by n")) {
            walk.setFetchSize(25);
            walk.setInt(1, 1);
            try (ResultSet rows = walk.executeQuery()) {
                for (int i = 1; i <= 400; i++) {
                    check("row " + i, rows.next() ? rows.getInt(1) : -1, i);
                    if (i == 60) {
                        switchNow();
                    }
                }
                check("end of rows", rows.next(), false);
            }
        }
    }

    public static void main(String[] args) throws Exception {
        int[] seen;
        try (Connection conn = connect(); Statement statement = conn.createStatement()) {
            statement.execute("drop table if exists jd");
            statement.execute("create table jd (id serial primary key, v text unique, n int)");
            seen = transaction(conn);
        }
        try (Connection conn = connect(); Statement statement = conn.createStatement()) {
            try (ResultSet rows = statement.executeQuery("select count(*), sum(n) from jd")) {
                rows.next();
                check("rows", rows.getInt(1), 402);
                check("sum", rows.getInt(2), 401 * 402 / 2);
            }
            contents(statement, seen);
            StringWriter out = new StringWriter();
            conn.unwrap(PGConnection.class).getCopyAPI()
                    .copyOut("copy (select v from jd where v ~ '^copied' order by n) to stdout", out);
            check("copied out", out.toString().split("\n").length, 200);
            statement.execute("drop table jd");
        }
    }
}
