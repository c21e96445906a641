//! Connections: accepted, served, ended in good order.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, http::HeaderValue, middleware};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{interval, sleep, timeout},
};
use torus_engine::api::EngineStats;
use tower_http::cors::{AllowOrigin, Any, CorsLayer};

use crate::{app::App, config::ServerConfig, guard, models::Entry, routes};

/// How often the recorder of metrics is asked to tidy up, whether or not anyone reads them.
const METRICS_UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// How long aborted requests have to write their last words.
const ABORT_GRACE: Duration = Duration::from_secs(2);

/// Pause after a connection could not be accepted, usually for want of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("no model is configured")]
    NoModel,
    #[error("a model has no name")]
    NoModelName,
    #[error("two models are called {0}; give each its own --served-model-name")]
    DuplicateModelName(String),
    #[error("the API key must not be empty; remove --api-key to serve without one")]
    EmptyApiKey,
    #[error(
        "the administrator's key must not be empty; remove --admin-api-key if nobody is to change plugins and models"
    )]
    EmptyAdminApiKey,
    #[error("the administrator's key must be another than the clients' --api-key")]
    SameKeys,
    #[error("{0} is not an origin that a browser could send")]
    InvalidOrigin(String),
    #[error("cannot listen on {address}: {source}")]
    Bind { address: String, source: io::Error },
}

/// A server that holds its address and does not yet answer.
pub struct BoundServer {
    listener: TcpListener,
    local_addr: SocketAddr,
    app: Arc<App>,
    router: Router,
}

/// Checks the configuration and takes the address.
pub async fn bind(config: ServerConfig) -> Result<BoundServer, ServeError> {
    check(&config)?;
    let cors = cors(&config.allowed_origins)?;
    let address = format!("{}:{}", config.host, config.port);
    let bind_error = |source| ServeError::Bind { address: address.clone(), source };
    let listener = TcpListener::bind((config.host.as_str(), config.port)).await.map_err(bind_error)?;
    let local_addr = listener.local_addr().map_err(bind_error)?;
    let app = Arc::new(App::new(config));
    let authorize = middleware::from_fn_with_state(Arc::clone(&app), guard::authorize);
    let mut router = routes::router(&app).layer(authorize);
    if let Some(cors) = cors {
        router = router.layer(cors);
    }
    let router = router.layer(middleware::from_fn(guard::identify)).with_state(Arc::clone(&app));
    Ok(BoundServer { listener, local_addr, app, router })
}

fn check(config: &ServerConfig) -> Result<(), ServeError> {
    let mut names = Vec::new();
    for model in &config.models {
        if model.names.is_empty() {
            return Err(ServeError::NoModelName);
        }
        names.extend(&model.names);
    }
    if names.is_empty() {
        return Err(ServeError::NoModel);
    }
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(ServeError::DuplicateModelName(pair[0].clone()));
    }
    if config.api_key.as_deref() == Some("") {
        return Err(ServeError::EmptyApiKey);
    }
    if config.admin_api_key.as_deref() == Some("") {
        return Err(ServeError::EmptyAdminApiKey);
    }
    if config.api_key.is_some() && config.api_key == config.admin_api_key {
        return Err(ServeError::SameKeys);
    }
    Ok(())
}

fn cors(origins: &[String]) -> Result<Option<CorsLayer>, ServeError> {
    if origins.is_empty() {
        return Ok(None);
    }
    let origin = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        let parse =
            |origin: &String| HeaderValue::from_str(origin).map_err(|_| ServeError::InvalidOrigin(origin.clone()));
        AllowOrigin::list(origins.iter().map(parse).collect::<Result<Vec<_>, _>>()?)
    };
    Ok(Some(CorsLayer::new().allow_origin(origin).allow_methods(Any).allow_headers(Any)))
}

impl BoundServer {
    /// Where clients reach it; with port 0, this tells which port it became.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// What there is to see of the models, also after [`BoundServer::serve`] has taken the server.
    pub fn models(&self) -> ServingModels {
        ServingModels(Arc::clone(&self.app))
    }

    /// Serves until `shutdown` is done. Then no connection and no request to a model is accepted any more; those in
    /// progress may finish within [`Limits::shutdown_grace`](crate::Limits::shutdown_grace) and are then aborted. Returns
    /// when the engines have ended.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) {
        let Self { listener, app, router, .. } = self;
        let upkeep = tokio::spawn(keep_metrics(Arc::clone(&app)));
        let places = Arc::new(Semaphore::new(app.limits.connections));
        let graceful = GracefulShutdown::new();
        let mut connections = JoinSet::new();
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            let (stream, place) = tokio::select! {
                accepted = accept(&listener, &places) => accepted,
                () = &mut shutdown => break,
                // So that the set does not grow.
                Some(_) = connections.join_next() => continue,
            };
            connections.spawn(serve_connection(&app, stream, router.clone(), &graceful, place));
        }
        drop(listener);
        app.begin_shutdown();
        finish(&app, graceful).await;
        connections.shutdown().await;
        upkeep.abort();
        // That it was aborted is no news. It holds the models until then.
        let _ = upkeep.await;
        app.models.end().await;
    }
}

/// The models of a server, as they come and go.
pub struct ServingModels(Arc<App>);

/// What an engine counts, and whose it is.
pub struct ModelStats {
    pub name: String,
    /// Different for each generation of a model.
    pub generation: u64,
    /// Tokens in a page; 0 until the model is loaded.
    pub page_size: usize,
    pub stats: EngineStats,
}

impl ServingModels {
    pub fn stats(&self) -> Vec<ModelStats> {
        let entries = self.0.models.entries();
        let of = |entry: &Entry| {
            let model = entry.model()?;
            let page_size = model.engine.info().map_or(0, |info| info.page_size);
            let name = entry.id().to_owned();
            Some(ModelStats { name, generation: model.generation, page_size, stats: model.engine.stats() })
        };
        entries.iter().filter_map(of).collect()
    }
}

/// Waits for requests in progress, and no longer than they may take.
async fn finish(app: &App, graceful: GracefulShutdown) {
    let mut finished = std::pin::pin!(graceful.shutdown());
    if timeout(app.limits.shutdown_grace, &mut finished).await.is_ok() {
        return;
    }
    let aborted = app.abort_all();
    tracing::warn!(aborted, "requests did not finish within the grace period and were aborted");
    if timeout(ABORT_GRACE, finished).await.is_err() {
        tracing::warn!("connections are closed although their clients have not read everything");
    }
}

async fn accept(listener: &TcpListener, places: &Arc<Semaphore>) -> (TcpStream, Option<OwnedSemaphorePermit>) {
    // The semaphore is never closed.
    let place = Arc::clone(places).acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, place),
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// The task that serves a connection.
fn serve_connection(
    app: &App,
    stream: TcpStream,
    router: Router,
    graceful: &GracefulShutdown,
    place: Option<OwnedSemaphorePermit>,
) -> impl Future<Output = ()> + Send + 'static {
    // A token is a small packet and must not wait for the next.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY could not be set");
    }
    let limits = &app.limits;
    let header_bytes = limits.header_bytes;
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_headers(limits.headers)
        .max_buf_size(header_bytes.max(8 << 10));
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(limits.header_timeout)
        .max_header_list_size(u32::try_from(header_bytes).unwrap_or(u32::MAX))
        .max_concurrent_streams(256);
    let service = TowerToHyperService::new(router);
    let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
    let connection = graceful.watch(connection);
    async move {
        let _place = place;
        if let Err(error) = connection.await {
            tracing::debug!(error, "a connection ended with an error");
        }
    }
}

/// Histograms collect samples until they are asked to sum them up.
async fn keep_metrics(app: Arc<App>) {
    let mut ticks = interval(METRICS_UPKEEP_INTERVAL);
    loop {
        ticks.tick().await;
        app.metrics.run_upkeep();
    }
}
