//! Whether there is a TPU or a GPU, found out in a process of its own.
//!
//! Where there is none, or where another process uses it, libtpu does not always say so: it asks the cloud's metadata server for
//! minutes, waits for other machines, or ends the process. So a child of this program opens it first, with a time limit, and
//! tells what it found as JSON. The TPU is free again when the child has ended.

use std::{
    env, fs,
    io::Read,
    path::Path,
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::args::Device;

/// The subcommand of the child.
pub const PROBE_COMMAND: &str = "probe-device";
/// After this a TPU that has not answered counts as not there. libtpu takes some seconds on a machine that has one.
const TIME_LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// What a device plugin finds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    pub platform: String,
    /// Kinds of the devices that this process can use.
    pub kinds: Vec<String>,
    /// Memory of one of them that programs can use.
    pub memory_bytes: Option<u64>,
}

/// What the child does: opens the device and prints what it is.
pub fn run_probe(device: Device, pjrt_plugin: &Path) -> anyhow::Result<ExitCode> {
    let plugin = torus_pjrt::Plugin::load(pjrt_plugin)?;
    let client = torus_pjrt::Client::new(&plugin, &torus_engine::client_options(device.platform(), 1))?;
    let devices: Vec<_> = client.devices()?.into_iter().filter(torus_pjrt::Device::is_addressable).collect();
    let found = Found {
        platform: client.platform_name().to_owned(),
        kinds: devices.iter().map(|device| device.kind().to_owned()).collect(),
        memory_bytes: devices.iter().filter_map(torus_pjrt::Device::memory_limit).min(),
    };
    println!("{}", serde_json::to_string(&found)?);
    Ok(ExitCode::SUCCESS)
}

/// Opens a TPU or a GPU in a child process. The error says what to do.
pub fn probe(device: Device, pjrt_plugin: &Path) -> anyhow::Result<Found> {
    let mut command = Command::new(env::current_exe().context("this program's own file is not known")?);
    command.args([PROBE_COMMAND, "--device", device.name(), "--pjrt-plugin"]).arg(pjrt_plugin);
    let what = if device == Device::Tpu { "TPU" } else { "GPU" };
    if device == Device::Tpu && !has_device_files(Path::new("/dev")) && env::var_os("TPU_SKIP_MDS_QUERY").is_none() {
        // It would ask the metadata server about a TPU that this machine does not have, many times.
        command.env("TPU_SKIP_MDS_QUERY", "1");
    }
    run_limited(command, TIME_LIMIT).and_then(|text| Ok(serde_json::from_str(&text)?)).with_context(|| {
        format!(
            "--device {}: no {what} answers through {}; see 'torus check-env', free the {what} if another process uses it, or \
             give --device cpu",
            device.name(),
            pjrt_plugin.display()
        )
    })
}

/// Whether the system has files through which a TPU is driven.
fn has_device_files(folder: &Path) -> bool {
    let names = |path: &Path| {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    let is_number = |name: &String| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
    names(folder).iter().any(|name| name.starts_with("accel")) || names(&folder.join("vfio")).iter().any(is_number)
}

/// The last line that a command prints, if it ends well and in time; else its last words.
fn run_limited(mut command: Command, limit: Duration) -> anyhow::Result<String> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (output, errors) = (reader(child.stdout.take()), reader(child.stderr.take()));
    let status = wait(&mut child, limit)?;
    let (output, errors) = (joined(output), joined(errors));
    let last = |text: &str| text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().trim().to_owned();
    match status {
        None => bail!("it does not answer within {} seconds", limit.as_secs()),
        Some(status) if status.success() => Ok(last(&output)),
        Some(status) => Err(match last(&errors) {
            words if words.is_empty() => anyhow!("it ends with {status}"),
            words => anyhow!("{}", words.trim_start_matches("error: ").to_owned()),
        }),
    }
}

/// `None` if it had to be ended.
fn wait(child: &mut Child, limit: Duration) -> anyhow::Result<Option<std::process::ExitStatus>> {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if started.elapsed() >= limit {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(POLL);
    }
}

type Text = Option<thread::JoinHandle<String>>;

/// Reads in a thread of its own, so that the child is never kept waiting.
fn reader(pipe: Option<impl Read + Send + 'static>) -> Text {
    let mut pipe = pipe?;
    Some(thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error counts.
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    }))
}

fn joined(text: Text) -> String {
    text.and_then(|thread| thread.join().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_child_answers_fails_or_is_ended() {
        let run = |script: &str, limit| run_limited(shell(script), limit).map_err(|error| error.to_string());
        let long = Duration::from_secs(600);
        assert_eq!(run("echo a note; echo '{}'; echo", long), Ok("{}".to_owned()));
        assert_eq!(run("echo lost >&2; echo 'error: no TPU' >&2; exit 1", long), Err("no TPU".to_owned()));
        assert!(run("kill -ABRT $$", long).unwrap_err().contains("signal: 6"));
        assert_eq!(run("exec sleep 600", Duration::ZERO), Err("it does not answer within 0 seconds".to_owned()));
        // More than a pipe holds.
        assert_eq!(run("yes | head -c 1000000 >&2; echo end", long), Ok("end".to_owned()));
    }

    #[test]
    fn device_files_are_those_of_tpus() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!has_device_files(folder.path()));
        fs::create_dir(folder.path().join("vfio")).unwrap();
        fs::write(folder.path().join("vfio/vfio"), "").unwrap();
        assert!(!has_device_files(folder.path()));
        fs::write(folder.path().join("vfio/0"), "").unwrap();
        assert!(has_device_files(folder.path()));
    }
}
