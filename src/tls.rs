//! TLS by rustls, as `sslmode`, `sslrootcert`, `sslcert` and `sslkey` ask for it.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use postgres::NoTls;
use postgres::config::SslMode;
use postgres::error::SqlState;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::error::{Error, Result};
use crate::link::{Open, open_with};
use crate::outside::outside;
use crate::url::{Asked, Check};

/// How connections are opened that are encrypted if the server can, or must be.
pub(crate) fn open(mode: SslMode, asked: &Asked) -> Result<Arc<Open>> {
    let encrypted = open_with(MakeRustlsConnect::new(client(mode, asked)?));
    if mode != SslMode::Prefer {
        return Ok(encrypted);
    }
    // As libpq has it: without encryption rather than not at all.
    let plain = open_with(NoTls);
    Ok(Arc::new(move |config| match encrypted(config) {
        Err(e) if is_of_encryption(&e) => plain(config).map_err(|_| e),
        other => other,
    }))
}

/// Whether it may be that the server only does not like that a connection is encrypted.
fn is_of_encryption(error: &postgres::Error) -> bool {
    // The latter is a rule of pg_hba.conf, or that there is none.
    error.to_string().contains("TLS handshake")
        || error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION)
}

fn client(mode: SslMode, asked: &Asked) -> Result<ClientConfig> {
    // Named, as the program may have chosen another for itself, or none.
    let provider = Arc::new(ring::default_provider());
    let algorithms = provider.signature_verification_algorithms;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::invalid(format!("TLS cannot be set up: {e}")).caused_by(e))?;
    let builder = match (asked.check, roots(mode, asked)?) {
        (Check::Host, Some(roots)) => builder.with_root_certificates(roots),
        (_, roots) => {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyHost { roots, algorithms }))
        }
    };
    let mut client = match identity(asked)? {
        Some((file, chain, key)) => {
            builder.with_client_auth_cert(chain, key).map_err(|e| unusable(CERTIFICATE, &file, e))?
        }
        None => builder.with_no_client_auth(),
    };
    client.alpn_protocols = vec![b"postgresql".to_vec()];
    Ok(client)
}

const ROOT: &str = "sslrootcert";
const CERTIFICATE: &str = "sslcert";
const KEY: &str = "sslkey";

fn unusable(what: &str, file: &Path, why: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::invalid(format!("{what} {} cannot be used: {why}", file.display())).caused_by(why)
}

/// The authorities that may vouch for the server; `None` if none has to.
fn roots(mode: SslMode, asked: &Asked) -> Result<Option<RootCertStore>> {
    if mode == SslMode::Prefer {
        // Whoever can change the certificate on its way can say as well that there is no TLS.
        if asked.root.is_some() {
            outside(|| {
                tracing::warn!("no certificate is checked with sslmode=prefer, whatever sslrootcert is")
            });
        }
        return Ok(None);
    }
    let file = match asked.root.as_deref() {
        Some("system") => return of_the_system().map(Some),
        Some(file) => PathBuf::from(file),
        None => match env::home_dir().map(|home| home.join(".postgresql/root.crt")) {
            Some(file) if file.exists() => file,
            _ if asked.check == Check::Nothing => return Ok(None),
            _ => {
                return Err(Error::invalid(
                    "sslmode=verify-ca and verify-full need the certificate of the authority: \
                     sslrootcert=FILE, sslrootcert=system, or ~/.postgresql/root.crt",
                ));
            }
        },
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(ROOT, &file)? {
        roots.add(certificate).map_err(|e| unusable(ROOT, &file, e))?;
    }
    Ok(Some(roots))
}

fn of_the_system() -> Result<RootCertStore> {
    let mut found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // Some of those that systems have are of kinds that nobody uses.
    if roots.add_parsable_certificates(found.certs).0 > 0 {
        return Ok(roots);
    }
    let none = Error::invalid("sslrootcert=system: this system has no certificates of authorities");
    Err(match found.errors.pop() {
        Some(e) => none.caused_by(e),
        None => none,
    })
}

fn certificates(what: &str, file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let read = |file| CertificateDer::pem_file_iter(file)?.collect::<Result<Vec<_>, _>>();
    match read(file) {
        Ok(none) if none.is_empty() => Err(unusable(what, file, pem::Error::NoItemsFound)),
        other => other.map_err(|e| unusable(what, file, e)),
    }
}

type Identity = (PathBuf, Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// The certificate by which the client proves who it is.
fn identity(asked: &Asked) -> Result<Option<Identity>> {
    let (certificate, key) = match &asked.identity {
        (None, None) => return Ok(None),
        (Some(certificate), Some(key)) => (PathBuf::from(certificate), PathBuf::from(key)),
        _ => return Err(Error::invalid("sslcert and sslkey go together")),
    };
    let chain = certificates(CERTIFICATE, &certificate)?;
    let key = PrivateKeyDer::from_pem_file(&key).map_err(|e| unusable(KEY, &key, e))?;
    Ok(Some((certificate, chain, key)))
}

/// Takes the certificate of any host: signed by one of the authorities, or by anybody if there are none.
#[derive(Debug)]
struct AnyHost {
    roots: Option<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for AnyHost {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(roots) = &self.roots {
            verify_server_cert_signed_by_trust_anchor(
                &ParsedCertificate::try_from(certificate)?,
                roots,
                intermediates,
                now,
                self.algorithms.all,
            )?;
        }
        Ok(ServerCertVerified::assertion())
    }

    // That the server has the key to its certificate is always checked: channel binding relies on it.
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
