//! `setu serve` as clients see it.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::program::setu;

/// A server that runs until it is dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// Host and port.
    pub address: String,
    /// What it has said since it listens.
    said: Arc<Mutex<String>>,
    /// What it said before that.
    beginning: String,
}

/// A response.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    /// Names are in lower case.
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Server {
    /// Starts `setu serve` with `args` on a free port.
    ///
    /// # Panics
    /// It doesn't come up.
    pub fn start(args: &[&str]) -> Server {
        let mut command = Command::new(setu());
        command.arg("serve").args(args).args(["--server.port", "0"]).stderr(Stdio::piped());
        let mut child = command.spawn().expect("setu starts");
        let mut lines = BufReader::new(child.stderr.take().expect("it is piped")).lines();
        let mut said = String::new();
        let address = loop {
            let line = lines.next().and_then(Result::ok);
            let Some(line) = line else { panic!("the server doesn't come up: {said}") };
            if let Some((_, address)) = line.split_once("http://") {
                break address.to_owned();
            }
            said.push_str(&line);
            said.push('\n');
        };
        // What else it says must not block it.
        let (beginning, said) = (said, Arc::new(Mutex::new(String::new())));
        let heard = said.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let mut heard = heard.lock().expect("whole");
                heard.push_str(&line);
                heard.push('\n');
            }
        });
        Server { child, address, said, beginning }
    }

    /// What it has said since it listens.
    ///
    /// # Panics
    /// Whoever listens has panicked.
    pub fn log(&self) -> String {
        self.said.lock().expect("whole").clone()
    }

    /// What it said before it listened.
    pub fn before_listening(&self) -> &str {
        &self.beginning
    }

    /// Bytes of memory that it holds.
    ///
    /// # Panics
    /// The system doesn't say.
    pub fn resident_bytes(&self) -> u64 {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id())).expect("it runs");
        let pages: u64 = statm.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).expect("a number");
        pages * 4096
    }

    /// # Panics
    /// There is no answer.
    pub fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], "")
    }

    /// Posts JSON.
    ///
    /// # Panics
    /// There is no answer.
    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.send("POST", path, &[("content-type", "application/json")], &body.to_string())
    }

    /// # Panics
    /// There is no answer.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .allow_non_standard_methods(true)
            .timeout_global(Some(Duration::from_secs(120)))
            .build()
            .into();
        let mut request = ureq::http::Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = if method == "GET" {
            agent.run(request.body(()).expect("a request"))
        } else {
            agent.run(request.body(body).expect("a request"))
        };
        let mut response = response.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
        let text = |value: &ureq::http::HeaderValue| value.to_str().unwrap_or_default().to_owned();
        let headers = response.headers().iter().map(|(name, value)| (name.to_string(), text(value))).collect();
        let body = response.body_mut().read_to_string().expect("UTF-8");
        Reply { status: response.status().as_u16(), headers, body }
    }

    /// Sends a request whose answer is yet to be read.
    ///
    /// # Panics
    /// There is no connection.
    pub fn begin(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(120))).expect("a timeout");
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n", self.address);
        headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
        head.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
        // A server that has refused already may have closed the connection.
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
        stream
    }

    /// The sum of the lines of `/metrics` of this name, whatever their labels.
    ///
    /// # Panics
    /// There is no answer.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let body = self.get("/metrics").body;
        let value = |line: &str| -> Option<f64> {
            let rest = line.strip_prefix(name)?;
            let rest = if rest.starts_with('{') { rest.rsplit_once('}')?.1 } else { rest };
            rest.strip_prefix(' ')?.trim().parse().ok()
        };
        body.lines().filter_map(value).reduce(|a, b| a + b)
    }

    /// Waits until `condition` holds.
    ///
    /// # Panics
    /// It doesn't within a minute.
    pub fn wait_until(&self, what: &str, mut condition: impl FnMut(&Server) -> bool) {
        let begun = Instant::now();
        while !condition(self) {
            assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Asks the server to end.
    ///
    /// # Panics
    /// It can't be asked.
    pub fn terminate(&self) {
        self.signal("TERM");
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// It can't be sent.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args([&format!("-{name}"), pid.as_str()]).status().expect("kill");
        assert!(status.success());
    }

    /// Waits for the server to end.
    ///
    /// # Panics
    /// It can't be waited for.
    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().expect("it ends")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Reply {
    /// # Panics
    /// The body isn't JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// The events of a stream that ended as it should.
    ///
    /// # Panics
    /// It didn't.
    pub fn events(&self) -> Vec<Value> {
        let mut data: Vec<&str> = self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.body);
        data.into_iter().map(|event| serde_json::from_str(event).expect("JSON")).collect()
    }
}
