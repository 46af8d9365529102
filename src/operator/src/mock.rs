//! An API server for tests: takes down every request, and answers as the test says.
//!
//! Over a real socket, so that what is compared is what the client sends.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Bytes, to_bytes};
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use kube::{Client, Config};
use serde_json::{Value, json};

/// One request.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    /// Method and path, as `GET /api/v1/pods`.
    pub(crate) what: String,
    pub(crate) query: String,
    pub(crate) body: Value,
}

/// A server and what it was asked.
pub(crate) struct Mock {
    pub(crate) client: Client,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Mock {
    /// Serves until the test's runtime ends.
    pub(crate) async fn start<F>(answer: F) -> Self
    where
        F: Fn(&Call) -> (u16, Value) + Clone + Send + Sync + 'static,
    {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let calls: Arc<Mutex<Vec<Call>>> = Arc::default();
        let heard = Arc::clone(&calls);
        let router = Router::new().fallback(move |request: Request| {
            let (heard, answer) = (Arc::clone(&heard), answer.clone());
            async move {
                let call = read(request).await;
                heard.lock().unwrap().push(call.clone());
                respond(answer(&call))
            }
        });
        tokio::spawn(async move { axum::serve(listener, router).await });
        let config = Config::new(format!("http://{address}").parse().unwrap());
        Self {
            client: Client::try_from(config).unwrap(),
            calls,
        }
    }

    /// Everything that was asked until now, in order.
    pub(crate) fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    /// The same in short.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.calls().into_iter().map(|call| call.what).collect()
    }
}

async fn read(request: Request) -> Call {
    let (parts, body) = request.into_parts();
    let bytes: Bytes = to_bytes(body, 1 << 20).await.unwrap();
    Call {
        what: format!("{} {}", parts.method, parts.uri.path()),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        body: serde_json::from_slice(&bytes).unwrap_or(Value::Null),
    }
}

fn respond((code, body): (u16, Value)) -> Response {
    let status = StatusCode::from_u16(code).unwrap();
    let kind = [("content-type", "application/json")];
    (status, kind, body.to_string()).into_response()
}

/// The answer of an API server that has refused.
pub(crate) fn refusal(code: u16, message: &str) -> (u16, Value) {
    // The client goes by the word.
    let reason = match code {
        404 => "NotFound",
        _ => "Refused",
    };
    let body = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure",
        "code": code, "reason": reason, "message": message,
    });
    (code, body)
}
