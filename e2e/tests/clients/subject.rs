//! What the programs connect to.

use helios_e2e::Result;
use helios_e2e::driver::Target;
use helios_testkit::{PgOptions, PgServer};

pub(crate) struct Subject(PgServer);

impl Subject {
    pub(crate) async fn start() -> Result<Self> {
        Ok(Self(PgServer::start(PgOptions::default()).await?))
    }

    pub(crate) fn target(&self) -> Target {
        Target {
            host: "127.0.0.1".into(),
            port: self.0.port(),
            user: "postgres".into(),
            password: String::new(),
            database: "postgres".into(),
        }
    }

    pub(crate) async fn switchover(&self) -> Result<()> {
        Ok(())
    }

    pub(crate) async fn stop(self) -> Result<()> {
        Ok(())
    }
}
