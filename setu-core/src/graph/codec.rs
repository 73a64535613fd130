//! The form in which a graph crosses the ABI: JSON in an envelope that names its format.
//!
//! An op or a field that the reader doesn't know is refused by name: running a graph without the part
//! that isn't understood would give wrong answers.

use serde::{Deserialize, Serialize};

use super::Graph;
use crate::error::{Error, Result};

/// Number of the format; a reader refuses a higher one.
pub const GRAPH_FORMAT: u32 = 1;

#[derive(Serialize)]
struct Envelope<'a> {
    setu_graph: u32,
    graph: &'a Graph,
}

#[derive(Deserialize)]
struct Header {
    setu_graph: u32,
}

#[derive(Deserialize)]
struct Body {
    graph: Graph,
}

impl Graph {
    /// The graph as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(&Envelope { setu_graph: GRAPH_FORMAT, graph: self }).expect("a graph has only string keys")
    }

    /// Reads and verifies a graph.
    ///
    /// # Errors
    /// Not a graph, a newer format, an op or field that this build doesn't know, or a graph that doesn't verify.
    pub fn from_bytes(bytes: &[u8]) -> Result<Graph> {
        let not_a_graph = |error| Error::contract(format!("the bytes are no graph that this build can read: {error}"));
        let header: Header = serde_json::from_slice(bytes).map_err(not_a_graph)?;
        if header.setu_graph > GRAPH_FORMAT {
            return Err(Error::contract(format!(
                "the graph has format {}, this build reads up to {GRAPH_FORMAT}: use a newer setu",
                header.setu_graph
            )));
        }
        let body: Body = serde_json::from_slice(bytes).map_err(not_a_graph)?;
        body.graph.verify()?;
        Ok(body.graph)
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;

    fn graph() -> Graph {
        let mut g = GraphBuilder::new("tiny", 8, 16);
        let table = g.weight("embed", "tok.weight", &[8, 4], Shard::Replicated);
        let x = g.embed("embed", table).unwrap();
        let x = g.select("select", x).unwrap();
        let logits = g.linear("head", x, table, None).unwrap();
        g.output("logits", logits);
        g.finish().unwrap()
    }

    #[test]
    fn graphs_round_trip() {
        assert_eq!(Graph::from_bytes(&graph().to_bytes()).unwrap(), graph());
    }

    #[test]
    fn ignored_tensors_cross_and_may_not_be_used() {
        let mut ignoring = graph();
        assert!(
            !String::from_utf8(ignoring.to_bytes()).unwrap().contains("ignored"),
            "older readers take no such field"
        );
        ignoring.ignored.push(Ignored { name: "rope.inv_freq".into(), why: "computed".into() });
        assert_eq!(Graph::from_bytes(&ignoring.to_bytes()).unwrap(), ignoring);
        ignoring.ignored[0].name = "tok.weight".into();
        let text = Graph::from_bytes(&ignoring.to_bytes()).unwrap_err().to_string();
        assert_eq!(text, "the tensor `tok.weight` is both used and ignored");
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let text = String::from_utf8(graph().to_bytes()).unwrap();
        let cases = [
            (text.replace("\"setu_graph\":1", "\"setu_graph\":2"), "the graph has format 2, this build reads up to 1"),
            (text.replace("\"select\"}", "\"select\",\"op\":\"fft\"}"), "unknown"),
            (text.replace("\"op\":\"select\"", "\"op\":\"fft\""), "unknown variant `fft`"),
            (text.replace("\"bias\":null", "\"bias\":null,\"gain\":2"), "unknown field `gain`"),
            (text.replace("[8,4]", "[8,5]"), "output %0 must be [tokens, 5], not [tokens, 4]"),
            ("{}".to_owned(), "missing field `setu_graph`"),
        ];
        for (text, expected) in
            cases.into_iter().filter(|(text, _)| *text != String::from_utf8(graph().to_bytes()).unwrap())
        {
            let error = Graph::from_bytes(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
