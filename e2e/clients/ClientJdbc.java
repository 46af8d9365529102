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
import java.util.Objects;
import java.util.Properties;
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
            statement.execute("insert into jd (id, v) values (1, 'again')");
            throw new IllegalStateException("a duplicate key was accepted");
        } catch (SQLException e) {
            check("SQLSTATE", e.getSQLState(), "23505");
            conn.rollback(before);
        }
    }

    private static void transaction(Connection conn) throws Exception {
        conn.setAutoCommit(false);
        String insert = "insert into jd (v, n) values (?, ?)";
        try (PreparedStatement add = conn.prepareStatement(insert)) {
            for (int i = 0; i < 200; i++) {
                add.setString(1, "batch " + i);
                add.setInt(2, i);
                add.addBatch();
            }
            check("batch", add.executeBatch().length, 200);
            CopyManager copy = conn.unwrap(PGConnection.class).getCopyAPI();
            StringBuilder rows = new StringBuilder();
            for (int i = 0; i < 200; i++) {
                rows.append("copied ").append(i).append('\t').append(i).append('\n');
            }
            check("copied", copy.copyIn("copy jd (v, n) from stdin", new StringReader(rows.toString())), 200L);
            mistake(conn);
            walk(conn);
            add.setString(1, "late");
            add.setInt(2, 1000);
            check("late row", add.executeUpdate(), 1);
        }
        conn.commit();
        conn.setAutoCommit(true);
    }

    private static void walk(Connection conn) throws Exception {
        try (PreparedStatement walk = conn.prepareStatement("select id from jd where n >= ? order by id")) {
            walk.setFetchSize(25);
            walk.setInt(1, 0);
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
        try (Connection conn = connect(); Statement statement = conn.createStatement()) {
            statement.execute("drop table if exists jd");
            statement.execute("create table jd (id serial primary key, v text unique, n int)");
            transaction(conn);
        }
        try (Connection conn = connect(); Statement statement = conn.createStatement()) {
            try (ResultSet rows = statement.executeQuery("select count(*), sum(n) from jd")) {
                rows.next();
                check("rows", rows.getInt(1), 401);
                check("sum", rows.getInt(2), 2 * 19900 + 1000);
            }
            StringWriter out = new StringWriter();
            conn.unwrap(PGConnection.class).getCopyAPI()
                    .copyOut("copy (select v from jd where v ~ '^copied' order by id) to stdout", out);
            check("copied out", out.toString().split("\n").length, 200);
            statement.execute("drop table jd");
        }
    }
}
