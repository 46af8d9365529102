//! The Kubernetes that the tests of the operator run on, through `kubectl` as a person would use
//! it. Which one it is says KUBECONFIG.

use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::time::Instant;

use crate::Result;

/// How long one `kubectl` may take, on a machine that is busy otherwise.
const LIMIT: Duration = Duration::from_secs(180);

/// A namespace of its own, removed with all that is in it.
#[derive(Debug)]
pub struct Namespace {
    /// Its name.
    pub name: String,
}

impl Namespace {
    /// Makes it.
    pub async fn create(name: &str) -> Result<Self> {
        let name = format!("{name}-{:06x}", std::process::id());
        run(&["create", "namespace", &name], None).await?;
        Ok(Self { name })
    }

    /// Removes it, without waiting for its end.
    pub async fn delete(self) -> Result<()> {
        run(&["delete", "namespace", &self.name, "--wait=false"], None)
            .await
            .map(drop)
    }

    /// Runs `kubectl` in it.
    pub async fn kubectl(&self, args: &[&str]) -> Result<String> {
        let mut all = vec!["--namespace", &self.name];
        all.extend(args);
        run(&all, None).await
    }

    /// Applies an object.
    pub async fn apply(&self, yaml: &str) -> Result<String> {
        let args = ["--namespace", &self.name, "apply", "-f", "-"];
        run(&args, Some(yaml)).await
    }

    /// Reads an object.
    pub async fn get(&self, what: &str, name: &str) -> Result<Value> {
        let text = self.kubectl(&["get", what, name, "-o", "json"]).await?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Watches an object until it is as wanted. One `kubectl` waits for changes: to start one for
    /// each look would take a good part of a small machine from what is being tested.
    pub async fn until(
        &self,
        what: &str,
        name: &str,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + limit;
        let mut last = Value::Null;
        while Instant::now() < deadline {
            let watch = self.watch(what, name, &mut last, &wanted);
            match tokio::time::timeout_at(deadline, watch).await {
                Ok(Ok(true)) => return Ok(last),
                // It is not there yet, or the API server is away.
                Ok(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                Err(_) => break,
            }
        }
        let mut status = last["status"].take();
        if let Some(fields) = status.as_object_mut() {
            fields.remove("state");
        }
        Err(format!("{what} {name} is not as wanted after {limit:?}: {status}").into())
    }

    /// Reads an object and its changes until it is as wanted, `true`, or no more can be read.
    async fn watch(
        &self,
        what: &str,
        name: &str,
        last: &mut Value,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<bool> {
        let namespace = &self.name;
        let mut child = Command::new("kubectl")
            .args(["--namespace", namespace, "get", what, name])
            .args(["--output", "json", "--watch"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let mut output = child.stdout.take().ok_or("no output")?;
        let mut text = Vec::new();
        while output.read_buf(&mut text).await? > 0 {
            let mut objects = serde_json::Deserializer::from_slice(&text).into_iter::<Value>();
            // The rest of one that is not whole follows.
            while let Some(Ok(object)) = objects.next() {
                *last = object;
                if wanted(last) {
                    return Ok(true);
                }
            }
            text.drain(..objects.byte_offset());
        }
        Ok(false)
    }

    /// A value of a Secret.
    pub async fn secret(&self, name: &str, key: &str) -> Result<String> {
        let path = format!("jsonpath={{.data.{key}}}");
        let text = self.kubectl(&["get", "secret", name, "-o", &path]).await?;
        let decoded = decode(text.trim()).ok_or("secret is not base64")?;
        Ok(String::from_utf8(decoded)?)
    }
}

/// Base64 with padding; small enough to need no library.
fn decode(text: &str) -> Option<Vec<u8>> {
    let mut bits: u32 = 0;
    let mut have = 0;
    let mut out = Vec::new();
    for byte in text.trim_end_matches('=').bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        have += 6;
        if have >= 8 {
            have -= 8;
            out.push(u8::try_from(bits >> have & 0xff).ok()?);
        }
    }
    Some(out)
}

/// Runs `kubectl` and returns what it printed.
pub async fn run(args: &[&str], input: Option<&str>) -> Result<String> {
    let mut child = Command::new("kubectl")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin
            .write_all(input.unwrap_or_default().as_bytes())
            .await?;
    }
    let output = tokio::time::timeout(LIMIT, child.wait_with_output())
        .await
        .map_err(|_| format!("kubectl {}: no end within {LIMIT:?}", args.join(" ")))??;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!(
        "kubectl {}: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    )
    .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_decoded() {
        assert_eq!(decode("aGVsaW9z").unwrap(), b"helios");
        assert_eq!(decode("YXBw").unwrap(), b"app");
        assert_eq!(decode("YQ==").unwrap(), b"a");
        assert_eq!(decode("?"), None);
    }
}
