//! One file over HTTP: in pieces if need be, verified, never more than was announced.
//!
//! Every attempt goes on where the last one stopped, by a range request. An attempt is cut after some time,
//! whatever its state: that finds a stalled connection, and costs a healthy one nothing but a new request.
//! What ends a transfer is a number of attempts in a row that bring nothing.

use super::digest::{Digest, Hasher};
use super::files::{create_parent, io_error, mismatch, remove};
use super::hub::HubOptions;
use super::progress::Progress;
use setu_core::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode, header};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

/// So many attempts in a row may bring nothing; the next one that does is the last.
const MAX_FRUITLESS: u32 = 4;
/// Fewer new bytes than this are nothing, unless they complete the file.
const MIN_PROGRESS: u64 = 4096;

/// A client for one server and its token.
pub(super) struct Client {
    agent: Agent,
    token: Option<String>,
    retry_wait: Duration,
}

/// A file to fetch.
pub(super) struct Wanted<'a> {
    /// What errors and the progress bar call it.
    pub what: &'a str,
    pub url: &'a str,
    pub size: u64,
    /// Checked where it is known.
    pub sha256: Option<Digest>,
}

impl Client {
    pub fn new(options: &HubOptions) -> Client {
        // The system's certificates rather than built-in ones: a company's proxy may have its own.
        let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
        let agent = Agent::config_builder()
            .tls_config(tls)
            .user_agent(concat!("setu/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_recv_body(Some(options.attempt_time))
            .build();
        Client { agent: Agent::new_with_config(agent), token: options.token.clone(), retry_wait: options.retry_wait }
    }

    /// A document of at most `limit` bytes.
    pub fn document(&self, url: &str, limit: u64) -> Result<Vec<u8>, Failure> {
        let mut fruitless = 0;
        loop {
            let body = self.get(url, 0).and_then(|response| match response.status() {
                StatusCode::OK => {
                    response.into_body().with_config().limit(limit).read_to_vec().map_err(|error| match error {
                        ureq::Error::BodyExceedsLimit(_) => Failure::Fatal(Error::invalid(format!(
                            "{url} sends more than the {limit} bytes that such a document may have"
                        ))),
                        error => Failure::Connection(error.to_string()),
                    })
                }
                status => Err(Failure::Status(status)),
            });
            match body {
                Err(failure) if failure.may_pass() && fruitless < MAX_FRUITLESS => {
                    fruitless += 1;
                    self.wait(fruitless);
                }
                body => return body,
            }
        }
    }

    /// Completes the file at `partial`, going on with what is there. A file that turns out wrong is removed.
    pub fn file(&self, wanted: &Wanted<'_>, partial: &Path, progress: &mut dyn Progress) -> Result<(), Failure> {
        create_parent(partial)?;
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(partial)
            .map_err(|error| io_error(error, "open", partial))?;
        progress.begin(&format!("downloading {}", wanted.what), Some(wanted.size));
        let mut hasher = hash_kept(&mut file, wanted.size, partial)?;
        progress.at(hasher.n_bytes());
        // Counting against the most that ever came bounds the loop also where every attempt begins again.
        let mut most = hasher.n_bytes();
        let mut fruitless = 0;
        while hasher.n_bytes() < wanted.size {
            match self.attempt(wanted, (&mut file, partial), &mut hasher, progress) {
                Err(failure) if !failure.may_pass() => return Err(failure),
                attempt => {
                    if hasher.n_bytes() >= most.saturating_add(MIN_PROGRESS) {
                        most = hasher.n_bytes();
                        fruitless = 0;
                    } else if fruitless < MAX_FRUITLESS {
                        fruitless += 1;
                    } else {
                        return attempt.and(Err(Failure::Connection("the connection brings nothing".into())));
                    }
                    if hasher.n_bytes() < wanted.size {
                        self.wait(fruitless);
                    }
                }
            }
        }
        drop(file);
        let got = hasher.finish();
        match wanted.sha256 {
            Some(sha256) if sha256 != got => {
                remove(partial)?;
                Err(mismatch(wanted.what, sha256, got).into())
            }
            _ => {
                progress.end();
                Ok(())
            }
        }
    }

    fn attempt(
        &self,
        wanted: &Wanted<'_>,
        (file, path): (&mut File, &Path),
        hasher: &mut Hasher,
        progress: &mut dyn Progress,
    ) -> Result<(), Failure> {
        let start = hasher.n_bytes();
        let response = self.get(wanted.url, start)?;
        match response.status() {
            StatusCode::OK if start == 0 => {}
            StatusCode::PARTIAL_CONTENT if range_start(&response) == Some(start) => {}
            // What isn't the rest of the file can't be appended: begin again with all of it.
            StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                *hasher = Hasher::default();
                restart(file, path)?;
                if response.status() != StatusCode::OK {
                    return Err(Failure::Connection("the server does not send the range that it was asked for".into()));
                }
            }
            status => return Err(Failure::Status(status)),
        }
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 1 << 18];
        loop {
            let n_read = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n_read) => n_read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Failure::Connection(error.to_string())),
            };
            if hasher.n_bytes() + n_read as u64 > wanted.size {
                remove(path)?;
                return Err(Error::invalid(format!(
                    "{} is longer than the {} bytes that were announced; what came was removed",
                    wanted.what, wanted.size
                ))
                .into());
            }
            file.write_all(&buffer[..n_read]).map_err(|error| io_error(error, "write", path))?;
            hasher.update(&buffer[..n_read]);
            progress.at(hasher.n_bytes());
        }
        Ok(())
    }

    fn get(&self, url: &str, start: u64) -> Result<Response<Body>, Failure> {
        // A compressed body has other ranges.
        let mut request = self.agent.get(url).header(header::ACCEPT_ENCODING, "identity");
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if start > 0 {
            request = request.header(header::RANGE, format!("bytes={start}-"));
        }
        tracing::debug!(url, start, "Sending a request.");
        request.call().map_err(|error| Failure::Connection(error.to_string()))
    }

    fn wait(&self, fruitless: u32) {
        std::thread::sleep(self.retry_wait * 2u32.pow(fruitless));
    }
}

/// Why a request gave nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// No connection, or it broke.
    Connection(String),
    /// The server's refusal.
    Status(StatusCode),
    /// Asking again would not help.
    Fatal(Error),
}

impl Failure {
    fn may_pass(&self) -> bool {
        match self {
            Failure::Connection(_) => true,
            Failure::Status(status) => status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS,
            Failure::Fatal(_) => false,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Fatal(error)
    }
}

/// Digests what an earlier run has left, or drops it where it can't be part of the file.
fn hash_kept(file: &mut File, size: u64, path: &Path) -> Result<Hasher> {
    let failed = |error| io_error(error, "read", path);
    if file.metadata().map_err(failed)?.len() > size {
        restart(file, path)?;
    }
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(hasher),
            n_read => hasher.update(&buffer[..n_read]),
        }
    }
}

fn restart(file: &mut File, path: &Path) -> Result<()> {
    file.set_len(0)
        .and_then(|()| file.seek(SeekFrom::Start(0)))
        .map(|_| ())
        .map_err(|error| io_error(error, "write", path))
}

/// The first byte's number in `Content-Range: bytes 5-9/10`.
fn range_start(response: &Response<Body>) -> Option<u64> {
    let range = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}
