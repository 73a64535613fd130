//! GGUF files that were split: `NAME-00001-of-00003.gguf` and its siblings are one checkpoint.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use setu_core::{Error, Result};

use super::{Header, Keys, split_number};

/// Parts of a split checkpoint, as file names count them.
const MAX_PARTS: u32 = 99_999;

/// What a part's file name says.
#[derive(Debug, PartialEq, Eq)]
struct Part<'a> {
    stem: &'a str,
    number: u32,
    count: u32,
}

/// Takes `NAME-00001-of-00003.gguf` apart.
fn part_of(name: &str) -> Option<Part<'_>> {
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let read = |digits: &str| -> Option<u32> {
        (digits.len() == 5 && digits.bytes().all(|byte| byte.is_ascii_digit())).then(|| digits.parse().ok())?
    };
    let (number, count) = (read(number)?, read(count)?);
    (1..=count).contains(&number).then_some(Part { stem, number, count })
}

/// All files of the checkpoint that the file at `path` with the header `header` belongs to, in order.
///
/// # Errors
/// The header says that it was split, and the file's name doesn't tell where the others are.
pub fn siblings(path: &Path, header: &Header) -> Result<Vec<PathBuf>> {
    let count = split_number(&header.keys, "split.count")?.unwrap_or(1);
    if count <= 1 {
        return Ok(vec![path.to_path_buf()]);
    }
    let part = path.file_name().and_then(|name| name.to_str()).and_then(part_of);
    let part = part.filter(|part| u64::from(part.count) == count).ok_or_else(|| {
        let count_shown = count.min(u64::from(MAX_PARTS));
        Error::invalid(format!(
            "it is one of {count} parts (`split.count`), so its name must end in \
             `-00001-of-{count_shown:05}.gguf` and the like for the others to be found"
        ))
    })?;
    let name = |number: u32| format!("{}-{number:05}-of-{:05}.gguf", part.stem, part.count);
    Ok((1..=part.count).map(|number| path.with_file_name(name(number))).collect())
}

/// Checks that `header` is part `index` of `count`.
pub fn check_part(header: &Header, index: usize, count: usize) -> Result<()> {
    let stated = split_number(&header.keys, "split.count")?;
    if stated != Some(count as u64) {
        let stated = stated.map_or("not split".to_owned(), |stated| format!("one of {stated} parts"));
        return Err(Error::invalid(format!("it says that it is {stated}, and its siblings are {count}")));
    }
    match split_number(&header.keys, "split.no")? {
        Some(number) if number == index as u64 => Ok(()),
        Some(number) => {
            Err(Error::invalid(format!("it says that it is part {number} (`split.no`), and its name {index}")))
        }
        None => Err(Error::invalid("it lacks the key `split.no`, which a part of a split file has")),
    }
}

/// Checks that all parts together hold as many tensors as the first one's `keys` say.
pub fn check_total(keys: &Keys, tensors: usize) -> Result<()> {
    match split_number(keys, "split.tensors.count")? {
        Some(stated) if stated != tensors as u64 => Err(Error::invalid(format!(
            "its parts hold {tensors} tensors and should hold {stated} (`split.tensors.count`): \
             they don't belong together"
        ))),
        _ => Ok(()),
    }
}

/// Groups the GGUF files of a folder into checkpoints; each is named by its first file.
pub fn group(names: Vec<String>) -> Vec<String> {
    let mut first: BTreeMap<String, String> = BTreeMap::new();
    for name in names {
        let key = match part_of(&name) {
            Some(part) => format!("{}-of-{}", part.stem, part.count),
            None => name.clone(),
        };
        let lowest = first.entry(key).or_insert_with(|| name.clone());
        if name < *lowest {
            *lowest = name;
        }
    }
    first.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts_are_taken_apart() {
        let part = |stem, number, count| Some(Part { stem, number, count });
        let cases = [
            ("m-Q4_0-00001-of-00003.gguf", part("m-Q4_0", 1, 3)),
            ("a-of-b-00003-of-00003.gguf", part("a-of-b", 3, 3)),
            ("m-00004-of-00003.gguf", None),
            ("m-00000-of-00003.gguf", None),
            ("m-1-of-3.gguf", None),
            ("m-+0001-of-00003.gguf", None),
            ("m.gguf", None),
            ("m-00001-of-00003.bin", None),
        ];
        for (name, expected) in cases {
            assert_eq!(part_of(name), expected, "{name}");
        }
    }

    #[test]
    fn parts_of_one_checkpoint_are_one() {
        let names = ["b.gguf", "a-00002-of-00002.gguf", "a-00001-of-00002.gguf", "a-00001-of-00003.gguf"];
        let groups = group(names.map(str::to_owned).to_vec());
        assert_eq!(groups, ["a-00001-of-00002.gguf", "a-00001-of-00003.gguf", "b.gguf"]);
    }
}
