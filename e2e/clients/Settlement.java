import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Statement;
import java.util.Objects;
import java.util.Properties;

/** The settlement of settlement.py, as the JDBC driver runs it. */
public final class Settlement {
    private static final BufferedReader INPUT =
            new BufferedReader(new InputStreamReader(System.in));
    private static final int ROWS = Integer.parseInt(
            System.getenv().getOrDefault("HELIOS_SETTLEMENT_ROWS", "100000"));
    private static final int BATCHES = 10;
    private static final int ACCOUNTS = 500;

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
        // Named statements from the second execution on.
        properties.setProperty("prepareThreshold", "2");
        String url = "jdbc:postgresql://" + System.getenv("PGHOST") + ":"
                + System.getenv("PGPORT") + "/" + System.getenv("PGDATABASE");
        return DriverManager.getConnection(url, properties);
    }

    private static long amount(long n) {
        return n * 7919 % 10007;
    }

    private static long fee(long n) {
        return amount(n) * 3 / 100;
    }

    /** The columns of the one row that a query gives, between commas. */
    private static String row(PreparedStatement query) throws SQLException {
        try (ResultSet rows = query.executeQuery()) {
            check("a row", rows.next(), true);
            return rows.getString(1) + "," + rows.getString(2);
        }
    }

    private static void prepare(Statement statement) throws SQLException {
        statement.execute("drop table if exists settled");
        statement.execute(
                "create table settled (account int primary key, amount bigint, fees bigint)");
        statement.execute("set work_mem = '32MB'");
        statement.execute("set app.run = 'evening'");
        statement.execute("create temporary table trades as select n as id, n % " + ACCOUNTS
                + " as account, n * 7919::bigint % 10007 as amount"
                + " from generate_series(1, " + ROWS + ") n");
        statement.execute("create index on trades (account)");
        statement.execute("analyze trades");
    }

    private static void settle(Connection conn, Statement statement) throws Exception {
        conn.setTransactionIsolation(Connection.TRANSACTION_SERIALIZABLE);
        conn.setAutoCommit(false);
        statement.execute(
                "create temporary table fees (id int primary key, fee bigint not null)");
        statement.execute("prepare charge (int) as insert into fees"
                + " select id, amount * 3 / 100 from trades where id % " + BATCHES + " = $1");
        long charged = 0;
        long fees = 0;
        try (PreparedStatement sums = conn.prepareStatement(
                        "select count(*), sum(fee)::bigint from fees where fee >= ?");
                PreparedStatement settings = conn.prepareStatement(
                        "select current_setting('work_mem'), current_setting('app.run')")) {
            sums.setLong(1, 0);
            for (int batch = 0; batch < BATCHES; batch++) {
                statement.execute("execute charge (" + batch + ")");
                for (int n = batch == 0 ? BATCHES : batch; n <= ROWS; n += BATCHES) {
                    charged += 1;
                    fees += fee(n);
                }
                switchNow();
                check("fees behind batch " + batch, row(sums), charged + "," + fees);
                check("settings", row(settings), "32MB,evening");
            }
        }
        statement.execute("insert into settled select account, sum(amount), sum(fee)"
                + " from trades join fees using (id) group by account");
        conn.commit();
        conn.setAutoCommit(true);
        // Still there behind the transaction.
        try (PreparedStatement left = conn.prepareStatement(
                "select (select count(*) from trades), (select count(*) from fees)")) {
            check("what is left", row(left), ROWS + "," + ROWS);
        }
    }

    private static void contents(Statement statement) throws SQLException {
        long[] amounts = new long[ACCOUNTS];
        long[] fees = new long[ACCOUNTS];
        for (int n = 1; n <= ROWS; n++) {
            amounts[n % ACCOUNTS] += amount(n);
            fees[n % ACCOUNTS] += fee(n);
        }
        try (ResultSet rows = statement.executeQuery(
                "select account, amount, fees from settled order by account")) {
            for (int account = 0; account < ACCOUNTS; account++) {
                check("row", rows.next() ? rows.getInt(1) : -1, account);
                check("amount of " + account, rows.getLong(2), amounts[account]);
                check("fees of " + account, rows.getLong(3), fees[account]);
            }
            check("end of rows", rows.next(), false);
        }
    }

    public static void main(String[] args) throws Exception {
        try (Connection conn = connect(); Statement statement = conn.createStatement()) {
            prepare(statement);
            settle(conn, statement);
        }
        try (Connection conn = connect(); Statement statement = conn.createStatement()) {
            contents(statement);
            statement.execute("drop table settled");
        }
    }
}
