//! `setu serve` as clients see it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::program::setu;

/// A server that runs until it is dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// Host and port.
    pub address: String,
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
        };
        // What else it says must not block it.
        std::thread::spawn(move || lines.for_each(drop));
        Server { child, address }
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
        let stream = self.begin(method, path, headers, body);
        Reply::read(stream)
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

    /// The value of a line of `/metrics`.
    ///
    /// # Panics
    /// There is no answer.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let body = self.get("/metrics").body;
        body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
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
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args(["-TERM", &pid]).status().expect("kill");
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
    /// Reads a response up to its end.
    ///
    /// # Panics
    /// It isn't HTTP.
    pub fn read(stream: TcpStream) -> Reply {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).expect("a status line");
        let status = line.split_whitespace().nth(1).and_then(|code| code.parse().ok());
        let status = status.unwrap_or_else(|| panic!("{line:?} is no status line"));
        let mut headers = Vec::new();
        loop {
            line.clear();
            reader.read_line(&mut line).expect("a header");
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.push((name.to_lowercase(), value.trim().to_owned()));
        }
        let chunked = headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked");
        let mut body = Vec::new();
        if chunked {
            loop {
                line.clear();
                if reader.read_line(&mut line).unwrap_or(0) == 0 {
                    break;
                }
                let length = usize::from_str_radix(line.trim(), 16).expect("a chunk's length");
                let mut chunk = vec![0; length + 2];
                reader.read_exact(&mut chunk).expect("a chunk");
                body.extend_from_slice(&chunk[..length]);
                if length == 0 {
                    break;
                }
            }
        } else {
            // A connection that is reset behind a refusal has told all it had to.
            let _ = reader.read_to_end(&mut body);
        }
        Reply { status, headers, body: String::from_utf8(body).expect("UTF-8") }
    }

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
