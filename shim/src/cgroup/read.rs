//! Reading the kernel's small text files; what is missing counts as nothing.

use std::{collections::HashMap, fs, path::Path};

/// Returns the number in `file`, `max` and negative numbers being as many as there can be.
pub(super) fn number(directory: &Path, file: &str) -> u64 {
    let Ok(text) = fs::read_to_string(directory.join(file)) else { return 0 };
    parse(text.trim())
}

fn parse(text: &str) -> u64 {
    if text == "max" || text.starts_with('-') { u64::MAX } else { text.parse().unwrap_or(0) }
}

/// Returns the numbers in `file`, one a line or in one line.
pub(super) fn numbers(directory: &Path, file: &str) -> Vec<u64> {
    let Ok(text) = fs::read_to_string(directory.join(file)) else { return Vec::new() };
    text.split_whitespace().map(parse).collect()
}

/// The `KEY NUMBER` lines of a file.
#[derive(Debug, Default)]
pub(super) struct Table(HashMap<String, u64>);

impl Table {
    pub(super) fn read(directory: &Path, file: &str) -> Self {
        Self::parse(&fs::read_to_string(directory.join(file)).unwrap_or_default())
    }

    pub(super) fn parse(text: &str) -> Self {
        let pair = |line: &str| {
            let (key, value) = line.split_once([' ', '='])?;
            Some((key.to_owned(), parse(value.trim())))
        };
        Self(text.lines().filter_map(pair).collect())
    }

    pub(super) fn get(&self, key: &str) -> u64 {
        self.0.get(key).copied().unwrap_or(0)
    }
}

/// What a container has of one RDMA device, or may have.
pub(super) struct Rdma {
    pub(super) device: String,
    pub(super) handles: u32,
    pub(super) objects: u32,
}

/// Returns the lines of `file`, which are `DEVICE hca_handle=N hca_object=N`.
pub(super) fn rdma(directory: &Path, file: &str) -> impl Iterator<Item = Rdma> {
    let text = fs::read_to_string(directory.join(file)).unwrap_or_default();
    let line = |line: &str| {
        let (device, counters) = line.split_once(' ')?;
        let table = Table::parse(&counters.replace(' ', "\n"));
        let count = |key| u32::try_from(table.get(key)).unwrap_or(u32::MAX);
        Some(Rdma { device: device.to_owned(), handles: count("hca_handle"), objects: count("hca_object") })
    };
    text.lines().filter_map(line).collect::<Vec<_>>().into_iter()
}

/// Returns the page sizes `hugetlb.SIZE.…` that a group has files for.
pub(super) fn huge_page_sizes(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let size = |name: &str| {
        let (size, file) = name.strip_prefix("hugetlb.")?.split_once('.')?;
        matches!(file, "usage_in_bytes" | "current").then(|| size.to_owned())
    };
    let mut sizes: Vec<_> = entries.flatten().filter_map(|entry| size(entry.file_name().to_str()?)).collect();
    sizes.sort();
    sizes
}
