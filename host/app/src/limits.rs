//! What this process may use of the machine: cores and memory, as CPU affinity and its cgroup (v1 or v2) allow.
//!
//! Only file contents are looked at, through a function that reads them, so that tests bring their own machine.

use std::{fs, path::Path};

/// Reads a file; `None` if it is not there.
type ReadFile<'a> = &'a dyn Fn(&Path) -> Option<String>;

#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Cores that the process may be scheduled on.
    pub affinity: usize,
    /// CPU time that the cgroup grants, in cores.
    pub cpu_quota: Option<f64>,
    /// Memory that the machine can still give out.
    pub machine_available_bytes: Option<u64>,
    /// Memory that the cgroup lets the process still take. Pages of files that can be dropped do not count as taken.
    pub cgroup_available_bytes: Option<u64>,
}

impl Limits {
    pub fn of_process() -> Self {
        let affinity = rustix::thread::sched_getaffinity(None).map_or(1, |set| set.count() as usize);
        Self::from_files(affinity, &|path| fs::read_to_string(path).ok())
    }

    fn from_files(affinity: usize, read: ReadFile<'_>) -> Self {
        let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
        let folders: Vec<_> = parse_cgroups(&groups).iter().flat_map(|group| group.folders(read)).collect();
        let quotas = folders.iter().filter_map(|folder| cpu_quota(folder, read));
        let left = folders.iter().filter_map(|folder| memory_left(folder, read));
        let meminfo = read(Path::new("/proc/meminfo")).unwrap_or_default();
        Self {
            affinity: affinity.max(1),
            cpu_quota: quotas.min_by(f64::total_cmp),
            machine_available_bytes: mem_available(&meminfo),
            cgroup_available_bytes: left.min(),
        }
    }

    /// Cores to use: as many as can run at once. A quota of two and a half cores is used by three threads.
    pub fn cpus(&self) -> usize {
        let quota = self.cpu_quota.map_or(usize::MAX, |cores| cores.ceil() as usize);
        self.affinity.min(quota).max(1)
    }

    /// Memory to use.
    pub fn memory_bytes(&self) -> Option<u64> {
        self.machine_available_bytes.into_iter().chain(self.cgroup_available_bytes).min()
    }
}

/// One line of `/proc/self/cgroup`.
struct Cgroup<'a> {
    /// Empty for version 2.
    controllers: &'a str,
    path: &'a str,
}

impl Cgroup<'_> {
    /// The folders of this group and of those above it, whose limits hold too. Inside a container the path is often
    /// that of the host, which is not there; the mounted root is then the container's own group.
    fn folders(&self, read: ReadFile<'_>) -> Vec<String> {
        let mount = match self.controllers {
            // Beside the old hierarchies, the new one is mounted below them.
            "" if read(Path::new("/sys/fs/cgroup/cgroup.controllers")).is_none() => "/sys/fs/cgroup/unified".to_owned(),
            "" => "/sys/fs/cgroup".to_owned(),
            controllers => format!("/sys/fs/cgroup/{controllers}"),
        };
        let below = Path::new(self.path).ancestors().map(|path| path.to_string_lossy().into_owned());
        below.map(|path| format!("{mount}{}", path.trim_end_matches('/'))).collect()
    }
}

fn parse_cgroups(text: &str) -> Vec<Cgroup<'_>> {
    let fields = text.lines().map(|line| line.splitn(3, ':').skip(1));
    fields.filter_map(|mut fields| Some(Cgroup { controllers: fields.next()?, path: fields.next()? })).collect()
}

/// The quota set in one folder, in cores.
fn cpu_quota(folder: &str, read: ReadFile<'_>) -> Option<f64> {
    let file = |name: &str| read(Path::new(&format!("{folder}/{name}")));
    let (quota, period) = match file("cpu.max") {
        Some(text) => text.split_once(' ').map(|(quota, period)| (quota.to_owned(), period.to_owned()))?,
        None => (file("cpu.cfs_quota_us")?, file("cpu.cfs_period_us")?),
    };
    // 'max' and -1 stand for no quota.
    let (quota, period): (f64, f64) = (quota.trim().parse().ok()?, period.trim().parse().ok()?);
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

/// What the memory limit of one folder leaves.
fn memory_left(folder: &str, read: ReadFile<'_>) -> Option<u64> {
    // Version 1 writes 'no limit' as the largest multiple of a page.
    const UNLIMITED: u64 = 1 << 60;
    let number = |name: &str| read(Path::new(&format!("{folder}/{name}")))?.trim().parse::<u64>().ok();
    let either = |new: &str, old: &str| number(new).or_else(|| number(old));
    let limit = either("memory.max", "memory.limit_in_bytes").filter(|limit| *limit < UNLIMITED)?;
    let used = either("memory.current", "memory.usage_in_bytes")?;
    let stat = read(Path::new(&format!("{folder}/memory.stat"))).unwrap_or_default();
    let file_pages = ["total_inactive_file", "inactive_file"].iter().find_map(|name| {
        stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse::<u64>().ok())
    });
    Some(limit.saturating_sub(used.saturating_sub(file_pages.unwrap_or(0))))
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let kib = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?.trim().strip_suffix(" kB")?;
    kib.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const MEMINFO: (&str, &str) = ("/proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:    8000 kB\n");

    fn limits(affinity: usize, files: &[(&str, &str)]) -> Limits {
        let files: BTreeMap<_, _> = files.iter().copied().chain([MEMINFO]).collect();
        Limits::from_files(affinity, &|path| files.get(path.to_str()?).map(|text| (*text).to_owned()))
    }

    #[test]
    fn without_cgroups_the_machine_is_the_limit() {
        let limits = limits(4, &[]);
        assert_eq!((limits.cpus(), limits.memory_bytes()), (4, Some(8_000 * 1024)));
        assert_eq!((limits.cpu_quota, limits.cgroup_available_bytes), (None, None));
    }

    #[test]
    fn version_2_takes_the_tightest_level() {
        let limits = limits(
            8,
            &[
                ("/proc/self/cgroup", "0::/pod/container\n"),
                ("/sys/fs/cgroup/cgroup.controllers", "cpu memory\n"),
                ("/sys/fs/cgroup/pod/container/cpu.max", "max 100000\n"),
                ("/sys/fs/cgroup/pod/container/memory.max", "max\n"),
                ("/sys/fs/cgroup/pod/container/memory.current", "1000\n"),
                ("/sys/fs/cgroup/pod/cpu.max", "250000 100000\n"),
                ("/sys/fs/cgroup/pod/memory.max", "5000000\n"),
                ("/sys/fs/cgroup/pod/memory.current", "2000000\n"),
                ("/sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 500000\nactive_file 7\n"),
            ],
        );
        assert_eq!((limits.cpu_quota, limits.cpus()), (Some(2.5), 3));
        assert_eq!(limits.memory_bytes(), Some(3_500_000));
    }

    #[test]
    fn a_container_sees_its_own_group_at_the_root() {
        let limits = limits(
            8,
            &[
                ("/proc/self/cgroup", "5:cpu,cpuacct:/docker/4f\n4:memory:/docker/4f\n0::/docker/4f\n"),
                ("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "150000\n"),
                ("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
                ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "4000000\n"),
                ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "3000000\n"),
                ("/sys/fs/cgroup/memory/memory.stat", "inactive_file 9\ntotal_inactive_file 1000000\n"),
            ],
        );
        assert_eq!((limits.cpu_quota, limits.cpus()), (Some(1.5), 2));
        assert_eq!(limits.memory_bytes(), Some(2_000_000));
    }

    #[test]
    fn version_1_says_no_limit_with_large_and_negative_numbers() {
        let limits = limits(
            2,
            &[
                ("/proc/self/cgroup", "2:cpu:/\n1:memory:/\n"),
                ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"),
                ("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
                ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
                ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "3000000\n"),
            ],
        );
        assert_eq!((limits.cpu_quota, limits.cgroup_available_bytes, limits.cpus()), (None, None, 2));
    }

    #[test]
    fn a_group_over_its_limit_leaves_nothing_and_a_small_quota_is_one_core() {
        let limits = limits(
            2,
            &[
                ("/proc/self/cgroup", "0::/\n"),
                ("/sys/fs/cgroup/cgroup.controllers", ""),
                ("/sys/fs/cgroup/cpu.max", "10000 100000"),
                ("/sys/fs/cgroup/memory.max", "10"),
                ("/sys/fs/cgroup/memory.current", "20"),
            ],
        );
        assert_eq!((limits.cpus(), limits.memory_bytes()), (1, Some(0)));
    }
}
