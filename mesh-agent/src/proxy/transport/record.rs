//! TLS 1.3 records (RFC 8446, section 5), sealed and opened where they lie: no allocation, no copy.
//!
//! rustls makes the handshake and keeps the traffic secrets (its `kernel` interface, made for kTLS); the AEAD is that of
//! aws-lc-rs, as in rustls. Its buffered connection was refused here: it allocates and copies each record once in each
//! direction, and cannot give the two directions to two owners.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};

pub const HEADER: usize = 5;
pub const TAG: usize = 16;
/// The most plaintext in one record.
pub const MAX_PLAIN: usize = 1 << 14;
/// What a record is longer than its plaintext.
pub const OVERHEAD: usize = HEADER + 1 + TAG;
/// The longest record that a peer may send, with padding (RFC 8446, 5.2).
pub const MAX_RECORD: usize = HEADER + MAX_PLAIN + 256;
/// A record with one KeyUpdate message.
pub const KEY_UPDATE_RECORD: usize = OVERHEAD + 5;

/// Far under the 2^24.5 records after which AES-GCM keys are worn out (RFC 8446, 5.5).
const RECORDS_PER_KEY: u64 = 1 << 23;

const APPLICATION_DATA: u8 = 23;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;

#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("the peer sent what is no TLS 1.3 record")]
    Malformed,
    #[error("a TLS record failed its authentication: the bytes were changed on their way")]
    Forged,
    #[error("the peer ended TLS with alert {0}")]
    Alert(u8),
    #[error("cannot seal a TLS record")]
    Seal,
    #[error("cannot change TLS keys: {0}")]
    Rekey(#[from] rustls::Error),
}

/// What both directions share: the traffic secrets, for key updates.
pub struct Secrets {
    kernel: RefCell<Kernel>,
    /// The peer asked us to change our sending key too.
    update_asked: Cell<bool>,
}

enum Kernel {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

/// The sending direction.
pub struct Sealer {
    key: Key,
    secrets: Rc<Secrets>,
}

/// The receiving direction.
pub struct Opener {
    key: Key,
    secrets: Rc<Secrets>,
}

struct Key {
    aead: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

/// What an opened record was.
#[derive(Debug, PartialEq, Eq)]
pub enum Opened {
    /// Application data: so many bytes after the header.
    Data(usize),
    /// Something of TLS itself; done with.
    Control,
    /// close_notify: the peer sends no more.
    Closed,
}

impl Sealer {
    /// Seals `record` in place: after 5 bytes for the header come the plaintext (at most `MAX_PLAIN`) and 17 bytes for
    /// content type and tag.
    pub fn seal(&mut self, record: &mut [u8]) -> Result<(), RecordError> {
        self.seal_as(record, APPLICATION_DATA)
    }

    /// Whether `key_update` must come before the next record.
    pub fn wants_key_update(&self) -> bool {
        self.key.sequence >= RECORDS_PER_KEY || self.secrets.update_asked.get()
    }

    /// A record that tells the peer of the new key, sealed with the old one; from here on the new one is used.
    pub fn key_update(&mut self) -> Result<[u8; KEY_UPDATE_RECORD], RecordError> {
        let mut record = [0; KEY_UPDATE_RECORD];
        // KeyUpdate, 1 byte, update_not_requested: each side counts its own records.
        record[HEADER..HEADER + 5].copy_from_slice(&[24, 0, 0, 1, 0]);
        self.seal_as(&mut record, HANDSHAKE)?;
        self.secrets.update_asked.set(false);
        self.key = Key::new(self.secrets.kernel.borrow_mut().update_tx()?)?;
        Ok(record)
    }

    /// A record with close_notify.
    pub fn close_notify(&mut self) -> Result<[u8; OVERHEAD + 2], RecordError> {
        let mut record = [0; OVERHEAD + 2];
        record[HEADER..HEADER + 2].copy_from_slice(&[1, 0]);
        self.seal_as(&mut record, ALERT)?;
        Ok(record)
    }

    fn seal_as(&mut self, record: &mut [u8], content: u8) -> Result<(), RecordError> {
        let inner = record.len().checked_sub(HEADER + TAG).filter(|n| (1..=MAX_PLAIN + 1).contains(n));
        let inner = inner.ok_or(RecordError::Seal)?;
        let length = u16::try_from(inner + TAG).map_err(|_| RecordError::Seal)?.to_be_bytes();
        let header = [APPLICATION_DATA, 3, 3, length[0], length[1]];
        record[..HEADER].copy_from_slice(&header);
        let (body, tag) = record[HEADER..].split_at_mut(inner);
        body[inner - 1] = content;
        let nonce = self.key.next_nonce();
        let sealed = self.key.aead.seal_in_place_separate_tag(nonce, Aad::from(header), body);
        tag.copy_from_slice(sealed.map_err(|_| RecordError::Seal)?.as_ref());
        Ok(())
    }
}

impl Opener {
    /// The length of the record that `bytes` begin with, or `None` where the header is not whole yet.
    pub fn record_len(bytes: &[u8]) -> Result<Option<usize>, RecordError> {
        let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
        let length = HEADER + usize::from(u16::from_be_bytes([header[3], header[4]]));
        if header[0] != APPLICATION_DATA || header[1] != 3 || !(OVERHEAD..=MAX_RECORD).contains(&length) {
            return Err(RecordError::Malformed);
        }
        Ok(Some(length))
    }

    /// Opens `record`, of the length that `record_len` gave, in place.
    pub fn open(&mut self, record: &mut [u8]) -> Result<Opened, RecordError> {
        let (header, body) = record.split_at_mut(HEADER);
        let nonce = self.key.next_nonce();
        let opened = self.key.aead.open_in_place(nonce, Aad::from(&*header), body);
        let plain: &mut [u8] = opened.map_err(|_| RecordError::Forged)?;
        let Some(last) = plain.iter().rposition(|b| *b != 0) else { return Err(RecordError::Malformed) };
        let content = plain[last];
        let plain = &plain[..last];
        match content {
            APPLICATION_DATA if plain.len() <= MAX_PLAIN => Ok(Opened::Data(plain.len())),
            ALERT => match plain {
                [_, 0] => Ok(Opened::Closed),
                [_, description] => Err(RecordError::Alert(*description)),
                _ => Err(RecordError::Malformed),
            },
            HANDSHAKE => self.handshake(plain).map(|()| Opened::Control),
            _ => Err(RecordError::Malformed),
        }
    }

    /// Messages after the handshake: tickets are not used here, key updates are followed.
    fn handshake(&mut self, mut messages: &[u8]) -> Result<(), RecordError> {
        while let [kind, a, b, c, rest @ ..] = messages {
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            if rest.len() < length {
                // A message over several records: tickets never are, with the peers there are.
                return Err(RecordError::Malformed);
            }
            let (message, rest) = rest.split_at(length);
            match (kind, message) {
                (4, _) => {}
                // A key update must be the last message of its record: the next has a new key.
                (24, [asked @ (0 | 1)]) if rest.is_empty() => {
                    self.key = Key::new(self.secrets.kernel.borrow_mut().update_rx()?)?;
                    if *asked == 1 {
                        self.secrets.update_asked.set(true);
                    }
                }
                _ => return Err(RecordError::Malformed),
            }
            messages = rest;
        }
        if messages.is_empty() { Ok(()) } else { Err(RecordError::Malformed) }
    }
}

impl Key {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, RecordError> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(RecordError::Rekey(rustls::Error::General("a cipher suite not known here".into()))),
        };
        let aead = LessSafeKey::new(UnboundKey::new(algorithm, key.as_ref()).map_err(|_| RecordError::Seal)?);
        let iv = iv.as_ref().try_into().map_err(|_| RecordError::Seal)?;
        Ok(Self { aead, iv, sequence })
    }

    /// Initialisation vector xor sequence number (RFC 8446, 5.3); counts up, so that no nonce is used twice.
    fn next_nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (n, s) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *n ^= s;
        }
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

impl Kernel {
    fn update_tx(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        match self {
            Self::Client(c) => c.update_tx_secret(),
            Self::Server(s) => s.update_tx_secret(),
        }
    }

    fn update_rx(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        match self {
            Self::Client(c) => c.update_rx_secret(),
            Self::Server(s) => s.update_rx_secret(),
        }
    }
}

/// Takes over the keys of a client's finished handshake.
pub fn client(
    secrets: ExtractedSecrets,
    kernel: KernelConnection<ClientConnectionData>,
) -> Result<(Sealer, Opener), RecordError> {
    both(secrets, Kernel::Client(kernel))
}

/// Takes over the keys of a server's finished handshake.
pub fn server(
    secrets: ExtractedSecrets,
    kernel: KernelConnection<ServerConnectionData>,
) -> Result<(Sealer, Opener), RecordError> {
    both(secrets, Kernel::Server(kernel))
}

fn both(secrets: ExtractedSecrets, kernel: Kernel) -> Result<(Sealer, Opener), RecordError> {
    let ExtractedSecrets { tx, rx } = secrets;
    let shared = Rc::new(Secrets { kernel: RefCell::new(kernel), update_asked: Cell::new(false) });
    Ok((Sealer { key: Key::new(tx)?, secrets: shared.clone() }, Opener { key: Key::new(rx)?, secrets: shared }))
}
