//! Streaming to many HTTP clients, beside a bare loop that writes the same bytes to as many sockets.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use indicatif::ProgressBar;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use torus_http::{GenerationDefaults, ServedModel, ServerConfig};
use torus_text::Tokenizer;

use super::{VOCAB, engine};

const PROMPT: usize = 32;
/// Times that both are measured, in turn: a machine that others use too is not equally fast all the time.
pub const ROUNDS: usize = 2;

/// Events a second.
pub struct Streams {
    clients: usize,
    tokens: usize,
    events: usize,
    served: f64,
    bare: f64,
}

pub async fn measure(clients: usize, tokens: usize, bar: &ProgressBar) -> anyhow::Result<Streams> {
    allow_files(clients)?;
    let (mut total, mut written) = (0, 0);
    let (mut serving, mut writing) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..ROUNDS {
        let (elapsed, read) = serve(clients, tokens, bar).await?;
        // Tokens that arrive together share an event.
        let (bytes, events) = (read.bytes.load(Ordering::Relaxed), read.events.load(Ordering::Relaxed).max(1));
        let event = vec![b'x'; (bytes / events) as usize];
        let rounds = (events as usize).div_ceil(clients);
        writing += write_bare(clients, rounds, &event).await?;
        serving += elapsed;
        (total, written) = (total + events as usize, written + rounds * clients);
    }
    let served = total as f64 / serving.as_secs_f64();
    Ok(Streams { clients, tokens, events: total, served, bare: written as f64 / writing.as_secs_f64() })
}

/// Lets this process open as many sockets as it may: each client takes two.
fn allow_files(clients: usize) -> anyhow::Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const BESIDE: u64 = 128;
    let wanted = 2 * clients as u64 + BESIDE;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum });
    raised.with_context(|| format!("--clients {clients}: {wanted} files must be open at once; see 'ulimit -n'"))
}

/// What came over all sockets.
#[derive(Default)]
struct Read {
    bytes: AtomicU64,
    events: AtomicU64,
}

/// Streams from an engine on the null device through the HTTP server. Gives the time, and what was read.
async fn serve(clients: usize, tokens: usize, bar: &ProgressBar) -> anyhow::Result<(Duration, Arc<Read>)> {
    // A token a millisecond for each client: more than can be written one by one.
    let engine = engine(clients, PROMPT + tokens + 1, clients + 1)?;
    crate::serve::wait_until_ready(&*engine).await.map_err(anyhow::Error::msg)?;
    let model = ServedModel {
        names: vec!["null".to_owned()],
        engine,
        tokenizer: Arc::new(tokenizer()?),
        chat_template: None,
        defaults: GenerationDefaults::default(),
        model_path: "null".to_owned(),
        tokenizer_path: "null".to_owned(),
        created_s: 0,
        origin: None,
    };
    let mut config = ServerConfig::new(vec![model], torus_http::install_metrics()?);
    config.port = 0;
    config.stream_output = true;
    let server = torus_http::bind(config).await?;
    let address = server.local_addr();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(server.serve(async {
        // Whoever drops the sender wants it to stop as well.
        let _ = stopped.await;
    }));
    let mut sockets = Vec::with_capacity(clients);
    for _ in 0..clients {
        sockets.push(TcpStream::connect(address).await?);
    }
    let total = Arc::new(Read::default());
    let started = Instant::now();
    let mut readers = JoinSet::new();
    for (client, socket) in sockets.into_iter().enumerate() {
        let bar = (client == 0).then(|| bar.clone());
        readers.spawn(read_stream(socket, client, tokens, total.clone(), bar));
    }
    while let Some(read) = readers.join_next().await {
        read??;
    }
    let elapsed = started.elapsed();
    drop(stop);
    serving.await?;
    Ok((elapsed, total))
}

/// Sends a request and reads its stream to the end.
async fn read_stream(
    mut socket: TcpStream,
    client: usize,
    tokens: usize,
    total: Arc<Read>,
    bar: Option<ProgressBar>,
) -> anyhow::Result<()> {
    let ids: Vec<_> = (0..PROMPT).map(|at| 16 + (client * 37 + at * 11) % 200).collect();
    let body = json!({"input_ids": ids, "stream": true,
        "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": true}});
    let body = body.to_string();
    let head = format!(
        "POST /generate HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(format!("{head}{body}").as_bytes()).await?;
    let mut buffer = vec![0; 64 << 10];
    let mut first = true;
    loop {
        let read = socket.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        if std::mem::take(&mut first) {
            anyhow::ensure!(buffer.starts_with(b"HTTP/1.1 200"), "the server refused a stream");
        }
        // An event ends with an empty line, and nothing else in a body has two line feeds in a row.
        let ends = buffer[..read].windows(2).filter(|pair| pair == b"\n\n").count();
        total.bytes.fetch_add(read as u64, Ordering::Relaxed);
        total.events.fetch_add(ends as u64, Ordering::Relaxed);
        if let Some(bar) = &bar {
            bar.inc(ends as u64);
        }
    }
}

/// Writes an event to every socket in turn, token after token, as a server would that has nothing else to do.
async fn write_bare(clients: usize, rounds: usize, event: &[u8]) -> anyhow::Result<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let mut readers = JoinSet::new();
    let mut sockets = Vec::with_capacity(clients);
    for _ in 0..clients {
        let (client, server) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (mut client, (server, _)) = (client?, server?);
        server.set_nodelay(true)?;
        sockets.push(server);
        readers.spawn(async move {
            let mut buffer = vec![0; 64 << 10];
            while client.read(&mut buffer).await? > 0 {}
            std::io::Result::Ok(())
        });
    }
    let started = Instant::now();
    for _ in 0..rounds {
        for socket in &mut sockets {
            socket.write_all(event).await?;
        }
    }
    drop(sockets);
    while let Some(read) = readers.join_next().await {
        read??;
    }
    Ok(started.elapsed())
}

/// A byte for each of the first tokens.
fn tokenizer() -> anyhow::Result<Tokenizer> {
    // Byte-level tokenizers write bytes that are no printable characters as U+0100 and following.
    let mut substitute = 0x100;
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255u8 {
        let text = match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            _ => {
                substitute += 1;
                char::from_u32(substitute - 1).context("a character")?
            }
        };
        vocab.insert(text.to_string(), json!(byte));
    }
    // The device's tokens are any of its vocabulary: words of letters.
    for token in 256..VOCAB {
        vocab.insert(format!("w{token}"), json!(token));
    }
    let model = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}});
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("tokenizer.json"), model.to_string())?;
    std::fs::write(folder.path().join("tokenizer_config.json"), "{}")?;
    Ok(Tokenizer::from_folder(folder.path())?)
}

impl Streams {
    pub fn print(&self) {
        println!(
            "streams to {} HTTP clients of {} tokens, {} events: {:.0} events/s; a bare loop over as many sockets writes {:.0}: \
             {:.0}% of it",
            self.clients,
            self.tokens,
            self.events,
            self.served,
            self.bare,
            self.served / self.bare * 100.0
        );
    }

    pub fn json(&self) -> Value {
        json!({"clients": self.clients, "tokens": self.tokens, "events": self.events, "events_per_s": self.served,
            "bare_events_per_s": self.bare, "share": self.served / self.bare})
    }
}
