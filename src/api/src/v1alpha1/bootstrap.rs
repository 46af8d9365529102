//! What a cluster starts from: a new data directory, or a copy of a running server.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a cluster starts from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "!has(self.baseBackup) || (!has(self.initdb.sql) && !has(self.initdb.sqlFrom))"
    )
    .message("spec.bootstrap.initdb.sql and sqlFrom are for a new database, not for a copy by baseBackup")
)]
pub struct Bootstrap {
    /// A new, empty data directory, and the application's role and database.
    #[serde(default)]
    pub initdb: Initdb,
    /// A copy of a running server in place of an empty data directory. `initdb.database` and
    /// `initdb.owner` are made in it where it does not have them; the owner gets a new password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_backup: Option<BaseBackup>,
}

/// A new data directory with an application's role and database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Initdb {
    /// Database of the application.
    #[serde(default = "app")]
    #[schemars(length(min = 1, max = 63))]
    pub database: String,
    /// Its owner, who can log in.
    #[serde(default = "app")]
    #[schemars(length(min = 1, max = 63))]
    pub owner: String,
    /// SQL that is run once in the new database, in the order given, as its owner; `RESET ROLE`
    /// makes what follows the superuser's. All of it is one transaction together with what `sqlFrom`
    /// says: what fails leaves nothing behind, and is tried again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), inner(length(min = 1, max = 65_536)))]
    pub sql: Vec<String>,
    /// Where more such SQL is, run behind `sql`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sql_from: Option<SqlSource>,
}

impl Default for Initdb {
    fn default() -> Self {
        Self {
            database: app(),
            owner: app(),
            sql: Vec::new(),
            sql_from: None,
        }
    }
}

fn app() -> String {
    "app".to_owned()
}

/// Where SQL is: one of the two.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.configMap) != has(self.secret)")
        .message("spec.bootstrap.initdb.sqlFrom must have either configMap or secret")
)]
pub struct SqlSource {
    /// In a ConfigMap of the cluster's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map: Option<KeyOf>,
    /// In a Secret of the cluster's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<KeyOf>,
}

/// A key of a ConfigMap or Secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeyOf {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// The key in it.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

/// A server that is copied with `pg_basebackup`, once, while it runs. It has to be of the image's
/// major version and have no tablespaces of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!(self.sslMode in ['verify-ca', 'verify-full']) || has(self.caSecret)")
        .message("spec.bootstrap.baseBackup.sslMode verify-ca and verify-full need caSecret")
)]
pub struct BaseBackup {
    /// Its name or address.
    #[schemars(length(min = 1, max = 253))]
    pub host: String,
    /// Its port.
    #[serde(default = "port")]
    #[schemars(range(min = 1, max = 65_535))]
    pub port: i32,
    /// A role with the attribute REPLICATION (or a superuser).
    #[schemars(length(min = 1, max = 63))]
    pub user: String,
    /// The role's password; none without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_secret: Option<KeyOf>,
    /// How much TLS is asked for, with libpq's meanings.
    #[serde(default)]
    pub ssl_mode: SslMode,
    /// The authority that its certificate has to be of, in PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret: Option<KeyOf>,
}

fn port() -> i32 {
    5432
}

/// TLS towards a server (<https://www.postgresql.org/docs/current/libpq-ssl.html>).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SslMode {
    /// Never.
    Disable,
    /// When the server has it.
    #[default]
    Prefer,
    /// Always.
    Require,
    /// Always, with a certificate of the authority.
    VerifyCa,
    /// Always, with a certificate of the authority that carries the host's name.
    VerifyFull,
}

impl SslMode {
    /// The mode as libpq writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Disable => "disable",
            Self::Prefer => "prefer",
            Self::Require => "require",
            Self::VerifyCa => "verify-ca",
            Self::VerifyFull => "verify-full",
        }
    }
}
