//! Clients that nobody here wrote, each in a short real program: once plainly, once with a
//! switchover in the middle of its transaction.

mod clients {
    pub(crate) mod rust_sqlx;
    pub(crate) mod rust_tokio_postgres;
}

use helios_e2e::driver::{Program, Programs};
use helios_e2e::subject::Subject;
use helios_e2e::{Result, Shown};

async fn both_ways(program: Program) -> Result<()> {
    let programs = Programs::set_up().await?;
    let subject = Subject::start().await?;
    let target = subject.target();
    let asked = programs.run(program, target, async || Ok(())).await?;
    if asked == 0 {
        return Err(format!("{program:?} never asked for a switchover").into());
    }
    let moved = programs
        .run(program, target, async || subject.switchover().await)
        .await;
    moved.map_err(|problem| format!("with a switchover: {problem}"))?;
    subject.stop().await;
    Ok(())
}

macro_rules! programs {
    ($($test:ident: $program:expr;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $test() -> std::result::Result<(), Shown> {
                Ok(both_ways($program).await?)
            }
        )*
    };
}

programs! {
    psql: Program::Python("client_psql");
    pgbench: Program::Python("client_pgbench");
    pg_dump_and_pg_restore: Program::Python("client_pg_dump");
    psycopg3: Program::Python("client_psycopg3");
    psycopg2: Program::Python("client_psycopg2");
    asyncpg: Program::Python("client_asyncpg");
    sqlalchemy: Program::Python("client_sqlalchemy");
    node_postgres: Program::Node("client_node");
    jdbc: Program::Java("ClientJdbc");
}

macro_rules! rust_programs {
    ($($test:ident: $module:ident;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $test() -> std::result::Result<(), Shown> {
                let subject = Subject::start().await?;
                clients::$module::program(subject.target(), async || Ok(())).await?;
                clients::$module::program(subject.target(), async || subject.switchover().await)
                    .await?;
                subject.stop().await;
                Ok(())
            }
        )*
    };
}

rust_programs! {
    tokio_postgres: rust_tokio_postgres;
    sqlx: rust_sqlx;
}
