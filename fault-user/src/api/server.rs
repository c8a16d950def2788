//! Serves the API on TCP and on a Unix socket. Slow clients can't block others: heads and bodies have a time limit, and
//! the oldest connection is closed when too many are open.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use axum::Router;
use axum::http::{Request, Uri};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::task::JoinHandle;

use super::security::ConnectionEnds;

/// Maximum number of open connections.
const CONNECTIONS: usize = 512;
/// Time limit for the head of a request, and for the pause between two requests.
const HEAD_WAIT: Duration = Duration::from_secs(30);
/// Pause after a failed accept, which means that descriptors have run out.
const PAUSE: Duration = Duration::from_millis(50);

/// The connections of one listener, the oldest first.
#[derive(Default)]
struct Open(VecDeque<JoinHandle<()>>);

impl Open {
    fn add(&mut self, connection: JoinHandle<()>) {
        if self.0.len() >= CONNECTIONS {
            self.0.retain(|connection| !connection.is_finished());
        }
        if self.0.len() >= CONNECTIONS
            && let Some(oldest) = self.0.pop_front()
        {
            oldest.abort();
        }
        self.0.push_back(connection);
    }
}

/// Merges consecutive slashes, as Toxiproxy does by a redirect: a client's base URL may end with one.
fn join_slashes(uri: &mut Uri) {
    if !uri.path().contains("//") {
        return;
    }
    let mut path = uri.path().to_owned();
    while path.contains("//") {
        path = path.replace("//", "/");
    }
    if let Some(query) = uri.query() {
        path = format!("{path}?{query}");
    }
    let mut parts = uri.clone().into_parts();
    let joined = path.parse().map(|path| parts.path_and_query = Some(path));
    match joined.map(|()| Uri::from_parts(parts)) {
        Ok(Ok(joined)) => *uri = joined,
        whatever => log::debug!("{uri}: {whatever:?}"),
    }
}

fn serve<S>(stream: S, ends: Option<ConnectionEnds>, router: &Router) -> JoinHandle<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let router = TowerToHyperService::new(router.clone());
    let service = service_fn(move |mut request: Request<Incoming>| {
        join_slashes(request.uri_mut());
        if let Some(ends) = ends {
            request.extensions_mut().insert(ends);
        }
        router.call(request)
    });
    tokio::spawn(async move {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_WAIT);
        if let Err(error) = builder
            .serve_connection(TokioIo::new(stream), service)
            .await
        {
            log::debug!("an API connection ended: {error}");
        }
    })
}

/// The addresses of both ends; `None` if the connection has ended.
fn ends_of(stream: &TcpStream) -> Option<ConnectionEnds> {
    Some(ConnectionEnds {
        client: stream.peer_addr().ok()?,
        server: stream.local_addr().ok()?,
    })
}

async fn after(error: io::Error) {
    log::error!("the API can't accept: {error}");
    tokio::time::sleep(PAUSE).await;
}

/// Serves on a TCP listener, for ever.
pub async fn serve_tcp(listener: TcpListener, router: Router) {
    let mut open = Open::default();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Answers are small: each goes out at once.
                if let Err(error) = stream.set_nodelay(true) {
                    log::debug!("nodelay: {error}");
                }
                let ends = ends_of(&stream);
                open.add(serve(stream, ends, &router));
            }
            Err(error) => after(error).await,
        }
    }
}

/// Serves on a Unix socket, for ever.
pub async fn serve_unix(listener: UnixListener, router: Router) {
    let mut open = Open::default();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => open.add(serve(stream, None, &router)),
            Err(error) => after(error).await,
        }
    }
}
