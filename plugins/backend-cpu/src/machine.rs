//! What the machine, and the part of it that the process may use, has to offer.

use std::fs;

/// Cores that the process may use: affinity and cgroup quota counted.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |threads| threads.get())
}

/// Bytes of memory in all.
pub fn memory_bytes() -> u64 {
    limited(meminfo("MemTotal:"), 0)
}

/// Bytes of memory that can still be had.
pub fn available_bytes() -> u64 {
    let used = cgroup("memory.current").unwrap_or(0);
    limited(meminfo("MemAvailable:"), used)
}

/// What the processor calls itself.
pub fn processor() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(|| "CPU".to_owned(), |(_, name)| name.trim().to_owned())
}

/// `bytes`, or what the cgroup's limit leaves beside `used` where that is less.
fn limited(bytes: u64, used: u64) -> u64 {
    cgroup("memory.max").map_or(bytes, |limit| bytes.min(limit.saturating_sub(used)))
}

/// A number of the process's own cgroup (version 2).
fn cgroup(file: &str) -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    fs::read_to_string(format!("/sys/fs/cgroup{path}/{file}")).ok()?.trim().parse().ok()
}

fn meminfo(key: &str) -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let value = info.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse::<u64>().ok());
    // Where the system doesn't tell, four GiB are a guess that most machines have.
    value.map_or(4 << 30, |kib| kib * 1024)
}

/// The address ranges that are files mapped for reading alone: their pages can be had again from the file.
pub fn file_mappings() -> Vec<std::ops::Range<usize>> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mapping = |line: &str| {
        let mut fields = line.split_whitespace();
        let (range, rights) = (fields.next()?, fields.next()?);
        let inode: u64 = fields.nth(2)?.parse().ok()?;
        let (start, end) = range.split_once('-')?;
        let range = usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?;
        (rights.starts_with("r-") && inode != 0).then_some(range)
    };
    maps.lines().filter_map(mapping).collect()
}

/// Takes the whole pages of `bytes` out of the process's memory, if they lie in one of `mappings`.
pub fn drop_pages(bytes: &[u8], mappings: &[std::ops::Range<usize>]) {
    const PAGE: usize = 4096;
    let start = (bytes.as_ptr() as usize).next_multiple_of(PAGE);
    let end = (bytes.as_ptr() as usize + bytes.len()) / PAGE * PAGE;
    if start < end && mappings.iter().any(|mapping| mapping.start <= start && end <= mapping.end) {
        #[cfg(target_os = "linux")]
        // SAFETY: the pages are clean ones of a file; the next access reads the same bytes again.
        unsafe {
            libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED);
        }
    }
}
