//! `docs/experiments/README.md`: a page of sections, of which some are made anew.

use super::{ALL, Section};

const HEAD: &str = "# Experiments

Each section is made by one command, plots and figures included:

```
cargo run --release -p setu-tests --bin experiments -- [NAME…]
```

All but `reality` run on the backend `sim`: engine, scheduler and batcher are the ones that serve, the time of a step is what a
step-time model says, and the clock is virtual. They come out the same on every machine. `reality` runs a workload on the CPU and
again on a simulation that was fitted to it, and says how far the two are apart.
";

/// The page with `sections` in place of those of the same name in `before`, which may be empty.
pub fn merge(before: &str, sections: &[Section]) -> String {
    let mut page = HEAD.to_owned();
    for (name, _) in ALL {
        let text = match sections.iter().find(|section| section.name == name) {
            Some(section) => Some(format!("## {}\n\n`experiments {name}`\n\n{}", section.title, section.text)),
            None => part(before, name).map(str::to_owned),
        };
        if let Some(text) = text {
            page.push_str(&format!("\n{}\n{}\n{}\n", opening(name), text.trim_end(), closing(name)));
        }
    }
    page
}

fn opening(name: &str) -> String {
    format!("<!-- {name} -->")
}

fn closing(name: &str) -> String {
    format!("<!-- end of {name} -->")
}

/// What a page holds between the marks of a section.
fn part<'a>(page: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = page.split_once(&opening(name))?;
    rest.split_once(&closing(name)).map(|(part, _)| part.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_that_is_made_anew_leaves_the_others() {
        let section = |name, text: &str| Section { name, title: "A title", text: text.to_owned() };
        let first = merge("", &[section("fairness", "Old."), section("chunking", "Kept.")]);
        let second = merge(&first, &[section("fairness", "New.")]);
        assert!(second.starts_with(HEAD) && second.contains("New.") && !second.contains("Old."));
        assert_eq!(part(&second, "chunking"), part(&first, "chunking"));
        assert_eq!(merge(&second, &[]), second);
        assert_eq!(part(&second, "deadline"), None);
    }
}
