use super::*;

const PASSWORD: &str = "pencil";
const SALT: &str = "W22ZaJ0SNY7soEsUEjb6gQ==";
const CLIENT_NONCE: &str = "rOprNGfwEbeRWgbNEkqO";
const SERVER_NONCE: &str = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";

fn verifier() -> Verifier {
    let salt = BASE64.decode(SALT).unwrap();
    build_verifier(PASSWORD, &salt, 4096).parse().unwrap()
}

/// The example of RFC 7677, section 3, on both sides.
#[test]
fn rfc_7677_example() {
    let secret = Secret::Password(PASSWORD);
    let client = Client::with_nonce(secret, Binding::None, "user", CLIENT_NONCE.to_owned());
    assert_eq!(client.mechanism(), "SCRAM-SHA-256");
    let first = client.first();
    assert_eq!(first, "n,,n=user,r=rOprNGfwEbeRWgbNEkqO");

    let (server, answer) = Server::new(verifier(), None)
        .first_with(MECHANISM.as_bytes(), first.as_bytes(), SERVER_NONCE)
        .unwrap();
    let nonce = format!("{CLIENT_NONCE}{SERVER_NONCE}");
    assert_eq!(answer, format!("r={nonce},s={SALT},i=4096"));

    let (client, proof) = client.finish(answer.as_bytes()).unwrap();
    let expected = "p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
    assert_eq!(proof, format!("c=biws,r={nonce},{expected}"));

    let (keys, signature) = server.finish(proof.as_bytes()).unwrap();
    let expected = "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=";
    assert_eq!(signature, expected);
    assert_eq!(client.verify(signature.as_bytes()).unwrap(), keys);
}

fn exchange(
    secret: Secret<'_>,
    verifier: Verifier,
    binding: Binding,
    end_point: Option<Vec<u8>>,
) -> Result<ScramKeys, ScramError> {
    let client = Client::new(secret, binding);
    let server = Server::new(verifier, end_point);
    let mechanism = client.mechanism();
    let (server, answer) = server.first(mechanism.as_bytes(), client.first().as_bytes())?;
    let (client, proof) = client.finish(answer.as_bytes())?;
    let (keys, signature) = server.finish(proof.as_bytes())?;
    assert_eq!(client.verify(signature.as_bytes())?, keys);
    Ok(keys)
}

#[test]
fn captured_keys_log_in_again() {
    let password = Secret::Password(PASSWORD);
    let keys = exchange(password, verifier(), Binding::None, None).unwrap();
    let again = exchange(Secret::Keys(&keys), verifier(), Binding::None, None).unwrap();
    assert_eq!(keys, again);
    // Another verifier of another password: the keys are worth nothing there.
    let other = build_verifier("other", b"another salt here", 4096);
    let denied = exchange(
        Secret::Keys(&keys),
        other.parse().unwrap(),
        Binding::None,
        None,
    );
    assert_eq!(denied, Err(ScramError::Denied));
}

#[test]
fn wrong_password_and_unknown_user_look_the_same() {
    let wrong = Secret::Password("wrong");
    let denied = exchange(wrong, verifier(), Binding::None, None);
    assert_eq!(denied, Err(ScramError::Denied));
    let mock = Verifier::mock("nobody", &[7; 32], DEFAULT_ITERATIONS);
    let denied = exchange(wrong, mock.clone(), Binding::None, None);
    assert_eq!(denied, Err(ScramError::Denied));
    // The same salt every time, of the same length as PostgreSQL's.
    let first = |verifier| {
        let server = Server::new(verifier, None);
        server
            .first_with(b"SCRAM-SHA-256", b"n,,n=,r=abc", "def")
            .unwrap()
            .1
    };
    assert_eq!(
        first(mock),
        first(Verifier::mock("nobody", &[7; 32], DEFAULT_ITERATIONS))
    );
    assert_eq!(
        first(Verifier::mock("x", &[7; 32], DEFAULT_ITERATIONS)).len(),
        first(verifier()).len()
    );
    assert_ne!(
        first(Verifier::mock("x", &[7; 32], DEFAULT_ITERATIONS)),
        first(Verifier::mock("y", &[7; 32], DEFAULT_ITERATIONS))
    );
}

#[test]
fn channel_binding_fits_or_fails() {
    let secret = Secret::Password(PASSWORD);
    let hash = || vec![9; 32];
    let bound = Binding::EndPoint(hash());
    assert!(exchange(secret, verifier(), bound.clone(), Some(hash())).is_ok());
    // A client that cannot bind may still come in over TLS.
    assert!(exchange(secret, verifier(), Binding::None, Some(hash())).is_ok());
    assert!(exchange(secret, verifier(), Binding::NotOffered, None).is_ok());
    // Another certificate in between, a hidden offer, a binding where there is none.
    assert!(
        exchange(
            secret,
            verifier(),
            Binding::EndPoint(vec![8; 32]),
            Some(hash())
        )
        .is_err()
    );
    assert!(exchange(secret, verifier(), Binding::NotOffered, Some(hash())).is_err());
    assert!(exchange(secret, verifier(), bound, None).is_err());
}

#[test]
fn server_is_checked() {
    let client = Client::new(Secret::Password(PASSWORD), Binding::None);
    let (_, answer) = Server::new(verifier(), None)
        .first(MECHANISM.as_bytes(), client.first().as_bytes())
        .unwrap();
    let (client, _) = client.finish(answer.as_bytes()).unwrap();
    let wrong = format!("v={}", BASE64.encode([0; 32]));
    assert_eq!(
        client.verify(wrong.as_bytes()),
        Err(ScramError::ServerSignature)
    );
}

#[test]
fn verifiers_are_postgresqls() {
    // postgres-protocol makes its own; ours must read it, and theirs must verify with ours.
    let theirs = postgres_protocol::password::scram_sha_256("p\u{AD}ä\u{2168}".as_bytes());
    let verifier: Verifier = theirs.parse().unwrap();
    assert!(exchange(Secret::Password("päIX"), verifier, Binding::None, None).is_ok());
    for bad in [
        "",
        "md5d3b07384d113edec49eaa6238ad5ff00",
        "SCRAM-SHA-256$4096:salt",
        "SCRAM-SHA-256$0:W22ZaJ0SNY7soEsUEjb6gQ==$AA==:AA==",
        "SCRAM-SHA-256$x:W22ZaJ0SNY7soEsUEjb6gQ==$AA==:AA==",
    ] {
        assert!(bad.parse::<Verifier>().is_err(), "{bad}");
    }
}

#[test]
fn secrets_are_not_printed() {
    let keys = ScramKeys {
        client_key: [0xAB; 32],
        stored_key: [0xAB; 32],
        server_key: [0xAB; 32],
    };
    assert_eq!(format!("{keys:?}"), "ScramKeys(..)");
    assert_eq!(format!("{:?}", verifier()), "Verifier(..)");
    assert_eq!(format!("{:?}", Secret::Password("x")), "Secret(..)");
}

#[test]
fn malformed_messages_are_errors() {
    for first in [
        "",
        "n",
        "n,,",
        "n,,n=",
        "n,,n=,r=",
        "n,a=x,n=,r=x",
        "q,,n=,r=x",
        "n,,m=x,n=,r=x",
    ] {
        let server = Server::new(verifier(), None);
        assert!(
            server
                .first(MECHANISM.as_bytes(), first.as_bytes())
                .is_err(),
            "{first}"
        );
    }
    for last in ["", "c=biws", "c=biws,r=x,p=AA==", "c=,r=,p=", ",p="] {
        let server = Server::new(verifier(), None);
        let (server, _) = server.first(MECHANISM.as_bytes(), b"n,,n=,r=x").unwrap();
        assert!(server.finish(last.as_bytes()).is_err(), "{last}");
    }
    for first in ["", "r=abc,s=AA==,i=1", "r=zzz,s=AA==,i=1", "e=other-error"] {
        let secret = Secret::Password(PASSWORD);
        let client = Client::with_nonce(secret, Binding::None, "", "abc".to_owned());
        assert!(client.finish(first.as_bytes()).is_err(), "{first}");
    }
}
