//! The proxies of a daemon: relays with their names and addresses in the API.

use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use axum::http::StatusCode;
use serde_json::{Map, Value, json};
use tokio::sync::Mutex;

use super::body::{Fields, number};
use super::error::ApiError;
use super::events::EventChannel;
use super::packet::{self, PacketToxic};
use super::security::Caller;
use crate::relay::{
    Decisions, Engine, GreetingFilter, Listen, Picked, Relay, RelayFault, Settings,
    StreamDirection, ToxicConfig, Transport, Upstream, resolve_listen, resolve_name,
};
use crate::rule::{Asked, NamePattern, is_alpn};
use crate::session::standing::{RulesChange, StandingRules, off_the_runtime};
use crate::steer::front::{ProxiedService, TransparentProxies};

/// A relay and its addresses as texts.
pub struct Proxy {
    relay: Arc<Relay>,
    texts: RwLock<Texts>,
    /// The redirection of a transparent proxy, whose listen address equals its upstream.
    place: Option<Arc<ProxiedService>>,
    /// The packet rules of the daemon, some of which implement toxics.
    rules: Arc<StandingRules>,
    packets: std::sync::Mutex<Vec<PacketToxic>>,
    /// Serializes changes of one proxy.
    changing: Mutex<()>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Texts {
    listen: String,
    upstream: String,
    enabled: bool,
}

/// A client's request for a new proxy.
#[derive(Clone, Debug, PartialEq)]
struct ProxyRequest {
    name: String,
    transport: Transport,
    texts: Texts,
    toxics: Vec<Value>,
}

impl ProxyRequest {
    fn read(fields: &Fields) -> Result<Self, ApiError> {
        let text = |name| Ok::<_, ApiError>(fields.text(name)?.unwrap_or_default().to_owned());
        let (transport, listen) = split_transport(&text("listen")?, &text("protocol")?)?;
        let upstream = split_transport(&text("upstream")?, "")?.1;
        let toxics = match fields.get("toxics") {
            Some(Value::Array(toxics)) => toxics.clone(),
            _ => Vec::new(),
        };
        Ok(Self {
            name: text("name")?,
            transport,
            texts: Texts {
                listen,
                upstream,
                enabled: fields.flag("enabled")?.unwrap_or(true),
            },
            toxics,
        })
    }

    /// Whether it is a transparent proxy.
    fn is_transparent(&self) -> bool {
        !self.texts.listen.is_empty() && self.texts.listen == self.texts.upstream
    }

    /// Checks that the caller may create such a proxy.
    fn allow(&self, caller: Caller) -> Result<(), ApiError> {
        if self.is_transparent() {
            return caller.require(TRANSPARENT);
        }
        caller.require_port(port_of(&self.texts.listen))
    }

    fn check(&self, place: &str) -> Result<(), ApiError> {
        if self.name.is_empty() {
            return Err(ApiError::missing(&format!("name{place}")));
        }
        if self.texts.upstream.is_empty() {
            return Err(ApiError::missing(&format!("upstream{place}")));
        }
        Ok(())
    }
}

/// The name of the feature in errors.
const TRANSPARENT: &str = "transparent proxies";

/// The port of an address; 0 if it has none or is invalid.
fn port_of(listen: &str) -> u16 {
    let port = listen.rsplit_once(':').map(|(_, port)| port.parse());
    port.and_then(Result::ok).unwrap_or_default()
}

/// Rejects a path given instead of an address.
fn refuse_unix(text: &str) -> Result<(), ApiError> {
    if text.starts_with("unix:") || text.starts_with('/') {
        return Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            format!(
                "{text} is a Unix socket, which is unsupported: give the HOST:PORT of the service"
            ),
        ));
    }
    Ok(())
}

/// Splits off the transport of `udp:HOST:PORT` and `udp://HOST:PORT`, which is equivalent to the `protocol` field.
fn split_transport(text: &str, protocol: &str) -> Result<(Transport, String), ApiError> {
    refuse_unix(text)?;
    let prefixes = [
        ("udp://", Transport::Udp),
        ("udp:", Transport::Udp),
        ("tcp://", Transport::Tcp),
        ("tcp:", Transport::Tcp),
    ];
    let named = match protocol.to_ascii_lowercase().as_str() {
        "" => None,
        "tcp" => Some(Transport::Tcp),
        "udp" => Some(Transport::Udp),
        other => {
            return Err(ApiError::bad_body(format!(
                "protocol {other:?}, expected \"tcp\" or \"udp\""
            )));
        }
    };
    for (prefix, transport) in prefixes {
        if let Some(rest) = text.strip_prefix(prefix) {
            return Ok((named.unwrap_or(transport), rest.to_owned()));
        }
    }
    Ok((named.unwrap_or_default(), text.to_owned()))
}

fn listen(transport: Transport, text: String) -> Listen {
    match transport {
        Transport::Tcp => Listen::Tcp(text),
        Transport::Udp => Listen::Udp(text),
    }
}

impl Proxy {
    /// The relay.
    #[must_use]
    pub const fn relay(&self) -> &Arc<Relay> {
        &self.relay
    }

    fn texts(&self) -> Texts {
        self.texts
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set_texts(&self, texts: Texts) {
        *self.texts.write().unwrap_or_else(PoisonError::into_inner) = texts;
    }

    /// The listen and upstream addresses as texts.
    #[must_use]
    pub fn addresses(&self) -> (String, String) {
        let texts = self.texts();
        (texts.listen, texts.upstream)
    }

    /// Its JSON in the API, without toxics.
    fn summary(&self) -> Map<String, Value> {
        let texts = self.texts();
        let mut shown = Map::new();
        shown.insert("name".to_owned(), json!(self.relay.name()));
        shown.insert("listen".to_owned(), json!(texts.listen));
        shown.insert("upstream".to_owned(), json!(texts.upstream));
        shown.insert("enabled".to_owned(), json!(texts.enabled));
        if self.relay.transport() == Transport::Udp {
            shown.insert("protocol".to_owned(), json!("udp"));
        }
        shown
    }

    /// Its JSON in the API.
    #[must_use]
    pub fn json(&self) -> Value {
        let mut shown = self.summary();
        shown.insert("toxics".to_owned(), Value::Array(self.toxics()));
        Value::Object(shown)
    }

    /// The JSON of its toxics, upstream first.
    #[must_use]
    pub fn toxics(&self) -> Vec<Value> {
        let toxics = self.relay.toxics();
        let of = |direction| {
            toxics
                .iter()
                .filter(move |toxic| toxic.direction == direction)
        };
        let packets = self.packets();
        let shown = |direction| {
            let rules = packets
                .iter()
                .filter(move |toxic| toxic.direction == direction);
            of(direction)
                .map(toxic_json)
                .chain(rules.map(PacketToxic::json))
        };
        StreamDirection::ALL.into_iter().flat_map(shown).collect()
    }

    fn packets(&self) -> MutexGuard<'_, Vec<PacketToxic>> {
        self.packets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn packet_toxic(&self, name: &str) -> Option<PacketToxic> {
        let packets = self.packets();
        packets.iter().find(|toxic| toxic.name == name).cloned()
    }

    /// The JSON of one toxic.
    ///
    /// # Errors
    ///
    /// 404.
    pub fn toxic(&self, name: &str) -> Result<Value, ApiError> {
        if let Some(toxic) = self.packet_toxic(name) {
            return Ok(toxic.json());
        }
        let toxics = self.relay.toxics();
        let toxic = toxics.iter().find(|toxic| toxic.name == name);
        toxic
            .map(toxic_json)
            .ok_or_else(|| crate::relay::ToxicError::NotFound.into())
    }

    /// Checks that the caller may change the proxy.
    fn allow(&self, caller: Caller) -> Result<(), ApiError> {
        if self.place.is_some() {
            return caller.require(TRANSPARENT);
        }
        caller.require_port(port_of(&self.texts().listen))
    }

    /// Starts or stops the proxy, and records the address that was bound.
    async fn set_enabled(&self, enabled: bool) -> Result<(), ApiError> {
        let mut texts = self.texts();
        if let Some(place) = &self.place
            && !enabled
        {
            place.refuse()?;
        }
        let applied = self.relay.set_enabled(enabled).await;
        texts.enabled = enabled && applied.is_ok();
        self.bound(texts);
        Ok(applied?)
    }

    fn bound(&self, mut texts: Texts) {
        if let Some(address) = self.relay.address()
            && self.place.is_none()
        {
            texts.listen = address.to_string();
        }
        self.set_texts(texts);
    }

    /// Applies a client's changes.
    async fn update(&self, fields: &Fields, caller: Caller) -> Result<(), ApiError> {
        let _one_at_a_time = self.changing.lock().await;
        let before = self.texts();
        let transport = self.relay.transport();
        let text = |name, old: &str| {
            Ok::<_, ApiError>(match fields.text(name)? {
                Some(text) => split_transport(text, "")?.1,
                None => old.to_owned(),
            })
        };
        let mut request = Texts {
            listen: text("listen", &before.listen)?,
            upstream: text("upstream", &before.upstream)?,
            enabled: fields.flag("enabled")?.unwrap_or(before.enabled),
        };
        caller.require_port(port_of(&request.listen))?;
        if self.place.is_some()
            && (request.listen != before.listen || request.upstream != before.upstream)
        {
            return Err(ApiError::new(
                StatusCode::BAD_REQUEST,
                "the address of a transparent proxy can't be changed: delete the proxy and create another one",
            ));
        }
        let moves = self.place.is_none()
            && request.listen != before.listen
            && resolve_listen(transport, &request.listen)
                .await?
                .to_string()
                != before.listen;
        if moves || request.upstream != before.upstream {
            if !moves {
                request.listen.clone_from(&before.listen);
            }
            self.relay.set_enabled(false).await?;
            let upstream = Upstream::name(request.upstream.clone());
            self.relay
                .rewire(listen(transport, request.listen.clone()), upstream)
                .await?;
            self.set_texts(Texts {
                enabled: false,
                ..request.clone()
            });
        }
        if request.enabled {
            self.set_enabled(true).await
        } else {
            self.set_enabled(false).await
        }
    }

    /// Adds a toxic. Checked in this order: stream, type, name, attributes.
    async fn add_toxic(&self, fields: &Fields) -> Result<Value, ApiError> {
        let _one_at_a_time = self.changing.lock().await;
        let (name, kind) = (
            fields.text("name")?,
            fields.text("type")?.unwrap_or_default(),
        );
        let stream = fields.text("stream")?.unwrap_or("downstream");
        let toxicity = fields.number("toxicity")?.unwrap_or(1.0);
        let direction = StreamDirection::parse(stream)
            .ok_or_else(|| invalid("stream was invalid, can be either upstream or downstream"))?;
        let packet = packet::kind(kind);
        let fault = RelayFault::of_kind(kind);
        if fault.is_none() && packet.is_none() {
            return Err(invalid("invalid toxic type"));
        }
        let name = name
            .filter(|name| !name.is_empty())
            .map_or_else(|| format!("{kind}_{stream}"), str::to_owned);
        if self.relay.toxics().iter().any(|toxic| toxic.name == name)
            || self.packet_toxic(&name).is_some()
        {
            return Err(crate::relay::ToxicError::Exists.into());
        }
        let filter = filter(fields)?;
        let fault = fault.filter(|fault| fault.acts_on(self.relay.transport()));
        let reads_streams = self.relay.transport() == Transport::Tcp
            && fault.as_ref().is_some_and(|fault| !fault.is_proxy_wide());
        if !filter.is_empty() && !reads_streams {
            return Err(invalid(
                "sni, host and alpn select TCP connections for a stream toxic: leave them out here",
            ));
        }
        let Some(fault) = fault else {
            let kind = packet.ok_or_else(|| unfit(kind))?;
            let toxic = PacketToxic {
                name,
                kind,
                direction,
                stream: fields.text("stream")?.map(str::to_owned),
                toxicity,
                attributes: Map::new(),
                rule: 0,
                text: String::new(),
            };
            return self.put_packet(toxic, fields.get("attributes"), None).await;
        };
        let attributes = fields.get("attributes").unwrap_or(&Value::Null);
        let fault = fault
            .with_attributes(attributes)
            .map_err(ApiError::bad_body)?;
        let config = ToxicConfig {
            name,
            direction,
            stream: stream.to_owned(),
            toxicity,
            connections: Picked::ALL,
            filter,
            datagrams: None,
            fault,
            decisions: Decisions::default(),
        };
        self.relay.add_toxic(config.clone()).await?;
        Ok(toxic_json(&config))
    }

    /// Applies a packet toxic, replacing its former version.
    async fn put_packet(
        &self,
        mut toxic: PacketToxic,
        attributes: Option<&Value>,
        toxicity: Option<f64>,
    ) -> Result<Value, ApiError> {
        if self.place.is_none() {
            return Err(packet::refused(toxic.kind));
        }
        toxic.change(attributes, toxicity)?;
        let upstream = self.texts().upstream;
        let label = format!("{} of {}", toxic.name, self.relay.name());
        let toxic = off_the_runtime(&self.rules, move |rules| {
            let request = toxic.new_rule(&upstream)?;
            toxic.text = request.to_string();
            let ids = rules.change(&RulesChange {
                add: vec![request],
                toxic: Some(label),
                remove: vec![toxic.rule],
                force: false,
            })?;
            toxic.rule = ids.first().copied().unwrap_or_default();
            Ok::<_, ApiError>(toxic)
        })
        .await?;
        let shown = toxic.json();
        let mut packets = self.packets();
        match packets.iter_mut().find(|there| there.name == toxic.name) {
            Some(there) => *there = toxic,
            None => packets.push(toxic),
        }
        Ok(shown)
    }

    /// Removes the packet toxics with this name, or all.
    async fn remove_packets(&self, name: Option<&str>) -> Result<bool, ApiError> {
        let is_meant = |toxic: &PacketToxic| name.is_none_or(|name| toxic.name == name);
        let ids: Vec<u64> = {
            let packets = self.packets();
            let meant = packets.iter().filter(|toxic| is_meant(toxic));
            meant.map(|toxic| toxic.rule).collect()
        };
        if ids.is_empty() {
            return Ok(false);
        }
        off_the_runtime(&self.rules, |rules| rules.remove(ids)).await?;
        self.packets().retain(|toxic| !is_meant(toxic));
        Ok(true)
    }

    async fn update_toxic(&self, name: &str, body: &[u8]) -> Result<Value, ApiError> {
        let _one_at_a_time = self.changing.lock().await;
        if let Some(toxic) = self.packet_toxic(name) {
            let fields = Fields::parse(body)?;
            let toxicity = fields.number("toxicity")?;
            return self
                .put_packet(toxic, fields.get("attributes"), toxicity)
                .await;
        }
        let toxics = self.relay.toxics();
        let toxic = toxics.iter().find(|toxic| toxic.name == name);
        let toxic = toxic.ok_or(crate::relay::ToxicError::NotFound)?;
        let fields = Fields::parse(body)?;
        let asked = filter(&fields)?;
        if !asked.is_empty() && asked != toxic.filter {
            return Err(invalid(
                "sni, host and alpn can't be changed: remove the toxic and add it again",
            ));
        }
        let toxicity = fields.number("toxicity")?;
        let fault = match fields.get("attributes") {
            Some(attributes) => Some(
                toxic
                    .fault
                    .with_attributes(attributes)
                    .map_err(ApiError::bad_body)?,
            ),
            None => None,
        };
        Ok(toxic_json(
            &self.relay.update_toxic(name, fault, toxicity).await?,
        ))
    }
}

fn unfit(kind: &str) -> ApiError {
    let why = format!("{kind} does not support this proxy's transport");
    ApiError::new(StatusCode::BAD_REQUEST, why)
}

fn toxic_json(config: &ToxicConfig) -> Value {
    let mut shown = json!({
        "attributes": config.fault.attributes(),
        "name": config.name,
        "type": config.fault.kind(),
        "stream": config.stream,
        "toxicity": number(config.toxicity),
    });
    for (key, value) in config.filter.asked.given() {
        shown[key] = json!(value);
    }
    shown
}

/// The error for a value that a toxic can't have.
fn invalid(message: &str) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, message)
}

/// Which connections a toxic acts on, by what their clients ask for.
fn filter(fields: &Fields) -> Result<GreetingFilter, ApiError> {
    let name = |key: &str| {
        let Some(text) = fields.text(key)? else {
            return Ok(None);
        };
        let pattern = NamePattern::of_name(text);
        let wrong = || invalid(&format!("{key}: {text:?} is no host name"));
        pattern.ok_or_else(wrong).map(Some)
    };
    Ok(GreetingFilter {
        asked: Asked {
            sni: name("sni")?,
            host: name("host")?,
            alpn: match fields.text("alpn")? {
                Some(text) if !is_alpn(text) => {
                    return Err(invalid(&format!("alpn: {text:?} is no protocol of ALPN")));
                }
                protocol => protocol.map(str::to_owned),
            },
        },
        server: None,
    })
}

/// The name of the feature in errors.
pub(super) const PACKET_RULES: &str = "packet rules";

/// All proxies of a daemon.
pub struct Proxies {
    engine: Arc<Engine>,
    seed: u64,
    udp_idle: Duration,
    events: EventChannel,
    /// The packet rules, with and without toxics.
    rules: Arc<StandingRules>,
    /// The hooks of transparent proxies, attached with the first one.
    front: Mutex<Option<Arc<TransparentProxies>>>,
    by_name: RwLock<BTreeMap<String, Arc<Proxy>>>,
    /// Serializes changes of the set.
    changing: Mutex<()>,
}

impl Proxies {
    /// Starts without proxies. `seed` is the random seed, `udp_idle` the time after which a silent UDP client is
    /// removed; rules that match `api_port` need force.
    ///
    /// # Errors
    /// The thread for packet rules can't be started.
    pub fn new(
        engine: Arc<Engine>,
        seed: u64,
        udp_idle: Duration,
        events: EventChannel,
        api_port: Option<u16>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            engine,
            seed,
            udp_idle,
            events,
            rules: Arc::new(StandingRules::new(seed, api_port)?),
            front: Mutex::new(None),
            by_name: RwLock::default(),
            changing: Mutex::new(()),
        })
    }

    /// The events of all proxies.
    #[must_use]
    pub const fn events(&self) -> &EventChannel {
        &self.events
    }

    /// The packet rules.
    #[must_use]
    pub const fn rules(&self) -> &Arc<StandingRules> {
        &self.rules
    }

    /// All, by name.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Proxy>> {
        self.by_name
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    /// One by name.
    ///
    /// # Errors
    ///
    /// 404.
    pub fn get(&self, name: &str) -> Result<Arc<Proxy>, ApiError> {
        let by_name = self.by_name.read().unwrap_or_else(PoisonError::into_inner);
        by_name.get(name).cloned().ok_or_else(ApiError::no_proxy)
    }

    /// One by name, for a caller that changes it.
    ///
    /// # Errors
    ///
    /// 404, and 403 if the caller may not change it.
    pub(super) fn get_for(&self, name: &str, caller: Caller) -> Result<Arc<Proxy>, ApiError> {
        let proxy = self.get(name)?;
        proxy.allow(caller)?;
        Ok(proxy)
    }

    fn insert(&self, proxy: &Arc<Proxy>) {
        let mut by_name = self.by_name.write().unwrap_or_else(PoisonError::into_inner);
        by_name.insert(proxy.relay.name().to_owned(), Arc::clone(proxy));
    }

    /// Redirects the connections to a transparent proxy's upstream.
    async fn place(&self, request: &ProxyRequest) -> Result<Option<Arc<ProxiedService>>, ApiError> {
        let texts = &request.texts;
        if !request.is_transparent() {
            return Ok(None);
        }
        let refused = |error: anyhow::Error| {
            let why = format!("a transparent proxy (listen equal to upstream): {error:#}");
            ApiError::new(StatusCode::BAD_REQUEST, why)
        };
        if request.transport == Transport::Udp {
            return Err(refused(anyhow::anyhow!(
                "UDP is not supported: use another listen address"
            )));
        }
        let addresses = resolve_name(&texts.upstream).await?;
        let mut front = self.front.lock().await;
        let open = match &*front {
            Some(open) => Arc::clone(open),
            None => {
                Arc::clone(front.insert(TransparentProxies::open(&self.engine).map_err(refused)?))
            }
        };
        Ok(Some(Arc::new(open.take(&addresses).map_err(refused)?)))
    }

    async fn make(&self, request: &ProxyRequest) -> Result<Proxy, ApiError> {
        let place = self.place(request).await?;
        let mut upstream = Upstream::name(request.texts.upstream.clone());
        let listen = match &place {
            None => listen(request.transport, request.texts.listen.clone()),
            Some(place) => {
                upstream.prepare = Some(ProxiedService::prepare());
                let place = Arc::downgrade(place);
                Listen::TcpHook(Arc::new(move || match place.upgrade() {
                    Some(place) => place.listen(),
                    None => Err(std::io::Error::other("the proxy has been deleted")),
                }))
            }
        };
        let settings = Settings {
            name: request.name.clone(),
            title: format!("proxy {}", request.name),
            seed: self.seed,
            listen,
            upstream,
            udp_idle: self.udp_idle,
            ordinals: Arc::default(),
        };
        Ok(Proxy {
            place,
            rules: Arc::clone(&self.rules),
            packets: std::sync::Mutex::default(),
            relay: Relay::new(&self.engine, settings),
            texts: RwLock::new(Texts {
                enabled: false,
                ..request.texts.clone()
            }),
            changing: Mutex::new(()),
        })
    }

    /// Creates a proxy, adds it, and starts it if it is enabled.
    async fn admit(&self, request: &ProxyRequest) -> Result<Arc<Proxy>, ApiError> {
        let proxy = Arc::new(self.make(request).await?);
        if let Err(error) = begin(&proxy, request).await {
            proxy.remove_packets(None).await?;
            return Err(error);
        }
        self.insert(&proxy);
        self.events
            .tell("proxy created", &request.name, &proxy.json());
        Ok(proxy)
    }

    /// `POST /proxies`.
    ///
    /// # Errors
    ///
    /// 400, 403, 409, 500.
    pub async fn create(&self, body: &[u8], caller: Caller) -> Result<Arc<Proxy>, ApiError> {
        let fields = Fields::parse(body)?;
        if fields.holds_objects() {
            let why =
                "missing required field: name; these are several proxies: POST them to /populate";
            return Err(ApiError::new(StatusCode::BAD_REQUEST, why));
        }
        let request = ProxyRequest::read(&fields)?;
        request.check("")?;
        request.allow(caller)?;
        let _one_at_a_time = self.changing.lock().await;
        if self.get(&request.name).is_ok() {
            return Err(ApiError::new(StatusCode::CONFLICT, "proxy already exists"));
        }
        self.admit(&ProxyRequest {
            toxics: Vec::new(),
            ..request
        })
        .await
    }

    /// `POST /populate`: returns the proxies created or kept, and the error that stopped it, if any.
    pub async fn populate(
        &self,
        body: &[u8],
        caller: Caller,
    ) -> (Vec<Arc<Proxy>>, Option<ApiError>) {
        let allowed =
            |request: &Vec<ProxyRequest>| request.iter().try_for_each(|one| one.allow(caller));
        let read = read_all(body).and_then(|request| allowed(&request).map(|()| request));
        let request = match read {
            Ok(request) => request,
            Err(error) => return (Vec::new(), Some(error)),
        };
        let _one_at_a_time = self.changing.lock().await;
        let mut proxies = Vec::new();
        for request in &request {
            match self.admit_or_keep(request, caller).await {
                Ok(proxy) => proxies.push(proxy),
                Err(error) => return (proxies, Some(error)),
            }
        }
        (proxies, None)
    }

    async fn admit_or_keep(
        &self,
        request: &ProxyRequest,
        caller: Caller,
    ) -> Result<Arc<Proxy>, ApiError> {
        if let Ok(proxy) = self.get(&request.name) {
            if is_same(&proxy, request).await? {
                return Ok(proxy);
            }
            proxy.allow(caller)?;
            self.forget(&proxy).await?;
        }
        self.admit(request).await
    }

    async fn forget(&self, proxy: &Arc<Proxy>) -> Result<(), ApiError> {
        let _one_at_a_time = proxy.changing.lock().await;
        proxy.set_enabled(false).await?;
        proxy.remove_packets(None).await?;
        self.by_name
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(proxy.relay.name());
        self.events
            .tell("proxy removed", proxy.relay.name(), &Value::Null);
        Ok(())
    }

    /// `POST` or `PATCH /proxies/{name}`.
    ///
    /// # Errors
    ///
    /// 400, 403, 404, 500.
    pub async fn update(
        &self,
        name: &str,
        body: &[u8],
        caller: Caller,
    ) -> Result<Arc<Proxy>, ApiError> {
        let proxy = self.get_for(name, caller)?;
        proxy.update(&Fields::parse(body)?, caller).await?;
        self.events.tell("proxy changed", name, &proxy.json());
        Ok(proxy)
    }

    /// `DELETE /proxies/{name}`.
    ///
    /// # Errors
    ///
    /// 403, 404.
    pub async fn delete(&self, name: &str, caller: Caller) -> Result<(), ApiError> {
        let _one_at_a_time = self.changing.lock().await;
        self.forget(&self.get_for(name, caller)?).await
    }

    /// `POST /reset`: every proxy enabled, every toxic and every rule removed.
    ///
    /// # Errors
    ///
    /// 403 if the caller may not change something; 500 with the first proxy that can't listen, after resetting the
    /// others.
    pub async fn reset(&self, caller: Caller) -> Result<(), ApiError> {
        if !self.rules.is_empty() {
            caller.require(PACKET_RULES)?;
        }
        self.all()
            .iter()
            .try_for_each(|proxy| proxy.allow(caller))?;
        let mut first = Ok(());
        for proxy in self.all() {
            let _one_at_a_time = proxy.changing.lock().await;
            let reset = async {
                proxy.relay.clear_toxics().await?;
                proxy.remove_packets(None).await?;
                proxy.set_enabled(true).await
            };
            first = first.and(reset.await);
        }
        first = first.and(
            off_the_runtime(&self.rules, StandingRules::clear)
                .await
                .map_err(ApiError::from),
        );
        self.events.tell("reset", "", &Value::Null);
        first
    }

    /// Stops every proxy and removes all rules.
    pub async fn stop(&self) {
        for proxy in self.all() {
            if let Err(error) = proxy.set_enabled(false).await {
                log::warn!("{}: {error}", proxy.relay.name());
            }
        }
        if let Err(error) = off_the_runtime(&self.rules, StandingRules::clear).await {
            log::error!("{error}");
        }
    }

    /// `POST /proxies/{name}/toxics`.
    ///
    /// # Errors
    ///
    /// 400, 403, 404, 409.
    pub async fn add_toxic(
        &self,
        name: &str,
        body: &[u8],
        caller: Caller,
    ) -> Result<Value, ApiError> {
        let proxy = self.get_for(name, caller)?;
        let toxic = proxy.add_toxic(&Fields::parse(body)?).await?;
        self.events.tell("toxic added", name, &toxic);
        Ok(toxic)
    }

    /// `POST` or `PATCH /proxies/{name}/toxics/{toxic}`.
    ///
    /// # Errors
    ///
    /// 400, 403, 404.
    pub async fn update_toxic(
        &self,
        name: &str,
        toxic: &str,
        body: &[u8],
        caller: Caller,
    ) -> Result<Value, ApiError> {
        let proxy = self.get_for(name, caller)?;
        let toxic = proxy.update_toxic(toxic, body).await?;
        self.events.tell("toxic changed", name, &toxic);
        Ok(toxic)
    }

    /// `DELETE /proxies/{name}/toxics/{toxic}`.
    ///
    /// # Errors
    ///
    /// 403, 404.
    pub async fn remove_toxic(
        &self,
        name: &str,
        toxic: &str,
        caller: Caller,
    ) -> Result<(), ApiError> {
        let proxy = self.get_for(name, caller)?;
        let _one_at_a_time = proxy.changing.lock().await;
        if !proxy.remove_packets(Some(toxic)).await? {
            proxy.relay.remove_toxic(toxic).await?;
        }
        self.events
            .tell("toxic removed", name, &json!({"name": toxic}));
        Ok(())
    }
}

/// Adds its toxics, and starts it if it is enabled.
async fn begin(proxy: &Proxy, request: &ProxyRequest) -> Result<(), ApiError> {
    for toxic in &request.toxics {
        proxy.add_toxic(&Fields::new(toxic.clone())?).await?;
    }
    if request.texts.enabled {
        proxy.set_enabled(true).await?;
    }
    Ok(())
}

/// Parses and checks the proxies of a populate body or config file.
fn read_all(body: &[u8]) -> Result<Vec<ProxyRequest>, ApiError> {
    let values = match super::body::value(body)? {
        Value::Array(values) => values,
        // The format of `GET /proxies`: an object by name.
        Value::Object(named) if named.values().any(Value::is_object) => {
            named.into_iter().map(|(_, proxy)| proxy).collect()
        }
        Value::Null => Vec::new(),
        _ => {
            return Err(ApiError::bad_body(
                "cannot unmarshal it into an array of proxies",
            ));
        }
    };
    let fields = values
        .into_iter()
        .map(Fields::new)
        .collect::<Result<Vec<_>, _>>()?;
    let request = fields
        .iter()
        .map(ProxyRequest::read)
        .collect::<Result<Vec<_>, _>>()?;
    for (index, request) in request.iter().enumerate() {
        request.check(&format!(" at proxy {}", index + 1))?;
    }
    Ok(request)
}

/// Whether a proxy has the requested listen address and upstream.
async fn is_same(proxy: &Proxy, request: &ProxyRequest) -> Result<bool, ApiError> {
    let texts = proxy.texts();
    if proxy.relay.transport() != request.transport || texts.upstream != request.texts.upstream {
        return Ok(false);
    }
    if proxy.place.is_some() {
        return Ok(texts.listen == request.texts.listen);
    }
    // The address of a proxy that has never listened may be a name. Such a proxy is created again, as in Toxiproxy.
    let asked = resolve_listen(request.transport, &request.texts.listen).await?;
    Ok(texts.listen.parse() == Ok(asked))
}
