/* Replicas that answer at once, so that what stands before them is what is measured.
 *
 *   worker CERTIFICATE KEY CA HTTP_COUNT GRPC_COUNT
 *
 * One thread, one epoll. Listens on 127.0.0.1, on ports that the kernel chooses: HTTP_COUNT for HTTP/1.1 in the clear,
 * where everything is answered with a chat completion, and GRPC_COUNT for gRPC over mutual TLS, each a replica of its own;
 * in the clear, too, where CERTIFICATE is "-".
 * The first line of standard output has the ports in this order. Each further line tells of a gRPC call: "started REPLICA
 * ID" or "finished REPLICA ID", REPLICA counted from 0, ID the call's x-request-id.
 *
 * A body that says "stream": true is answered by an event every TICK_MS, TOKENS of them, over either protocol.
 *
 * Of HTTP/2 there is what Envoy needs: one HEADERS frame a call, no dynamic table (SETTINGS_HEADER_TABLE_SIZE 0), so
 * that a header is found by the bytes of its name; flow control towards the peer is left to its large windows.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum { TICK_MS = 20, TOKENS = 200, BUFFER = 1 << 18, FRAME = 9, MAX_STREAMS = 1 << 14, MAX_CALLS = 1024, ID = 64 };

static const char ANSWER[] =
    "{\"id\":\"a\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,\"message\":"
    "{\"role\":\"assistant\",\"content\":\".\"},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":1,"
    "\"completion_tokens\":1,\"total_tokens\":2}}";
static const char EVENT[] =
    "data: {\"id\":\"a\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,"
    "\"delta\":{\"content\":\" token\"},\"finish_reason\":null}]}\n\n";
static const char DONE[] = "data: [DONE]\n\n";

/* A call whose body is on its way. */
struct call {
    uint32_t id;
    int is_stream;
    char request[ID];
};

struct connection {
    int fd, replica; /* replica -1: HTTP/1.1 */
    int call_count;
    SSL *ssl;
    size_t have, out_have, out_sent, unacknowledged;
    int is_greeted, is_writing;
    struct call calls[MAX_CALLS];
    uint8_t in[BUFFER], out[BUFFER];
};

struct stream {
    struct connection *connection;
    uint32_t id;
    int left;
    char request[ID];
};

struct listener {
    int fd, replica;
};

static int epoll_fd;
static SSL_CTX *tls;
static struct stream streams[MAX_STREAMS];
static int stream_count;
static char lines[1 << 20];
static size_t lines_have;

/* Routers write what they read anew, with or without the space. */
static int wants_stream(const void *data, size_t size) {
    return memmem(data, size, "\"stream\": true", 14) || memmem(data, size, "\"stream\":true", 13);
}

static void die(const char *what) {
    perror(what);
    ERR_print_errors_fp(stderr);
    exit(1);
}

/* Calls are told of in blocks; where nobody reads, they are dropped rather than waited for. */
static void tell(const char *what, int replica, const char *id) {
    if (*id && lines_have + 128 < sizeof lines)
        lines_have += (size_t)sprintf(lines + lines_have, "%s %d %s\n", what, replica, id);
}

static void flush_lines(void) {
    size_t sent = 0;
    while (sent < lines_have) {
        ssize_t n = write(1, lines + sent, lines_have - sent);
        if (n <= 0) break;
        sent += (size_t)n;
    }
    memmove(lines, lines + sent, lines_have - sent);
    lines_have -= sent;
}

static void close_connection(struct connection *c) {
    for (int i = 0; i < stream_count;)
        if (streams[i].connection == c)
            streams[i] = streams[--stream_count];
        else
            i++;
    if (c->ssl) SSL_free(c->ssl);
    close(c->fd);
    free(c);
}

static void put(struct connection *c, const void *data, size_t size) {
    if (c->out_sent && c->out_have + size > BUFFER) {
        memmove(c->out, c->out + c->out_sent, c->out_have - c->out_sent);
        c->out_have -= c->out_sent;
        c->out_sent = 0;
    }
    if (c->out_have + size > BUFFER) return; /* A peer that reads nothing. */
    memcpy(c->out + c->out_have, data, size);
    c->out_have += size;
}

/* Returns whether the connection lives. */
static int flush(struct connection *c) {
    while (c->out_sent < c->out_have) {
        size_t size = c->out_have - c->out_sent;
        ssize_t n;
        if (c->ssl) {
            ERR_clear_error();
            int done = SSL_write(c->ssl, c->out + c->out_sent, (int)size);
            int error = done > 0 ? 0 : SSL_get_error(c->ssl, done);
            if (error && error != SSL_ERROR_WANT_WRITE && error != SSL_ERROR_WANT_READ) return 0;
            n = error ? -1 : done;
        } else {
            n = write(c->fd, c->out + c->out_sent, size);
            if (n < 0 && errno != EAGAIN) return 0;
        }
        if (n < 0) break;
        c->out_sent += (size_t)n;
    }
    if (c->out_sent == c->out_have) c->out_sent = c->out_have = 0;
    if ((c->out_have > 0) != c->is_writing) {
        c->is_writing = c->out_have > 0;
        struct epoll_event event = {EPOLLIN | (c->is_writing ? EPOLLOUT : 0), {.ptr = c}};
        epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
    }
    return 1;
}

/* HTTP/2 */

static void frame_head(uint8_t *at, size_t size, int type, int flags, uint32_t id) {
    uint8_t head[FRAME] = {(uint8_t)(size >> 16), (uint8_t)(size >> 8), (uint8_t)size, (uint8_t)type, (uint8_t)flags,
                           (uint8_t)(id >> 24), (uint8_t)(id >> 16), (uint8_t)(id >> 8), (uint8_t)id};
    memcpy(at, head, FRAME);
}

static void put_frame(struct connection *c, int type, int flags, uint32_t id, const void *data, size_t size) {
    uint8_t head[FRAME];
    frame_head(head, size, type, flags, id);
    put(c, head, FRAME);
    put(c, data, size);
}

static size_t varint(uint8_t *at, size_t value) {
    size_t n = 0;
    for (; value > 127; value >>= 7) at[n++] = (uint8_t)(value | 128);
    at[n++] = (uint8_t)value;
    return n;
}

/* DATA with one google.api.HttpBody: content_type = 1, data = 2. */
static void put_body(struct connection *c, uint32_t id, const char *type, const char *data) {
    uint8_t message[1024];
    size_t n = 5, type_size = strlen(type), size = strlen(data);
    message[n++] = 0x0a;
    n += varint(message + n, type_size);
    memcpy(message + n, type, type_size);
    n += type_size;
    message[n++] = 0x12;
    n += varint(message + n, size);
    memcpy(message + n, data, size);
    n += size;
    uint32_t length = htonl((uint32_t)(n - 5));
    message[0] = 0;
    memcpy(message + 1, &length, 4);
    put_frame(c, 0, 0, id, message, n);
}

/* :status 200, content-type application/grpc; then grpc-status 0: literals without indexing. */
static const uint8_t HEAD[] = "\x88\x0f\x10\x10"
                              "application/grpc";
static const uint8_t TRAILERS[] = "\x00\x0bgrpc-status\x01"
                                  "0";

static void end_stream(struct connection *c, uint32_t id, const char *request) {
    put_frame(c, 1, 0x5, id, TRAILERS, sizeof TRAILERS - 1);
    tell("finished", c->replica, request);
}

/* Huffman's code of HPACK for what ids are made of; the names' encodings are constants. Source: RFC 7541, B. */
static int huffman_symbol(uint32_t bits, int length) {
    static const struct { uint8_t code, length, symbol; } CODES[] = {
        {0x0, 5, '0'}, {0x1, 5, '1'}, {0x2, 5, '2'}, {0x3, 5, 'a'}, {0x4, 5, 'c'}, {0x5, 5, 'e'},
        {0x16, 6, '-'}, {0x19, 6, '3'}, {0x1a, 6, '4'}, {0x1b, 6, '5'}, {0x1c, 6, '6'}, {0x1d, 6, '7'},
        {0x1e, 6, '8'}, {0x1f, 6, '9'}, {0x23, 6, 'b'}, {0x24, 6, 'd'}, {0x25, 6, 'f'}};
    for (size_t i = 0; i < sizeof CODES / sizeof *CODES; i++)
        if (CODES[i].length == length && CODES[i].code == bits) return CODES[i].symbol;
    return 0;
}

static void huffman_text(const uint8_t *data, size_t size, char *text) {
    uint32_t bits = 0;
    int length = 0, n = 0;
    for (size_t i = 0; i < size * 8 && n < ID - 1; i++) {
        bits = bits << 1 | (uint32_t)(data[i / 8] >> (7 - i % 8) & 1);
        int symbol = huffman_symbol(bits, ++length);
        if (symbol) {
            text[n++] = (char)symbol;
            bits = 0;
            length = 0;
        }
    }
    text[n] = 0;
}

/* Copies the call's x-request-id; empty where it has none. */
static void read_id(const uint8_t *block, size_t size, char *text) {
    /* The length (with Huffman's bit), and "x-request-id" in Huffman's code. */
    static const uint8_t NAME[] = {0x89, 0xf2, 0xb5, 0x85, 0xed, 0x69, 0x50, 0x95, 0x8d, 0x27};
    *text = 0;
    const uint8_t *at = memmem(block, size, NAME, sizeof NAME);
    if (!at) return;
    at += sizeof NAME;
    size_t length = *at & 127;
    int is_huffman = *at++ & 128;
    if (length == 127 || at + length > block + size) return;
    if (is_huffman)
        huffman_text(at, length, text);
    else if (length < ID) {
        memcpy(text, at, length);
        text[length] = 0;
    }
}

static struct call *call_of(struct connection *c, uint32_t id) {
    for (int i = 0; i < c->call_count; i++)
        if (c->calls[i].id == id) return &c->calls[i];
    return NULL;
}

static void begin_stream(struct connection *c, uint32_t id, const char *request) {
    if (stream_count == MAX_STREAMS) return;
    struct stream *stream = &streams[stream_count++];
    stream->connection = c;
    stream->id = id;
    stream->left = TOKENS;
    strcpy(stream->request, request);
}

static void answer_call(struct connection *c, uint32_t id) {
    struct call *call = call_of(c, id);
    if (!call) return;
    put_frame(c, 1, 0x4, id, HEAD, sizeof HEAD - 1);
    if (call->is_stream)
        begin_stream(c, id, call->request);
    else {
        put_body(c, id, "application/json", ANSWER);
        end_stream(c, id, call->request);
    }
    *call = c->calls[--c->call_count];
}

static void take_data(struct connection *c, uint32_t id, const uint8_t *data, size_t size) {
    struct call *call = call_of(c, id);
    if (call && wants_stream(data, size)) call->is_stream = 1;
    c->unacknowledged += size;
    if (c->unacknowledged >= 1 << 14) {
        uint32_t more = htonl((uint32_t)c->unacknowledged);
        put_frame(c, 8, 0, 0, &more, 4);
        c->unacknowledged = 0;
    }
}

static void take_frame(struct connection *c, int type, int flags, uint32_t id, const uint8_t *data, size_t size) {
    if (type == 1 && c->call_count < MAX_CALLS) {
        struct call *call = &c->calls[c->call_count++];
        call->id = id;
        call->is_stream = 0;
        read_id(data, size, call->request);
        tell("started", c->replica, call->request);
    } else if (type == 0) {
        take_data(c, id, data, size);
    } else if (type == 3) {
        for (int i = 0; i < stream_count; i++)
            if (streams[i].connection == c && streams[i].id == id) streams[i] = streams[--stream_count];
    } else if (type == 4 && !(flags & 1)) {
        put_frame(c, 4, 1, 0, NULL, 0);
    } else if (type == 6 && !(flags & 1)) {
        put_frame(c, 6, 1, 0, data, size);
    }
    if (type < 2 && flags & 1) answer_call(c, id);
}

/* Returns how much of the input was taken. */
static size_t take_http2(struct connection *c) {
    static const uint8_t SETTINGS[] = {0, 1, 0, 0, 0, 0,        /* HEADER_TABLE_SIZE 0 */
                                       0, 3, 0, 0, 4, 0,        /* MAX_CONCURRENT_STREAMS 1024 */
                                       0, 4, 0, 0x10, 0, 0};    /* INITIAL_WINDOW_SIZE 1 MiB */
    size_t at = 0;
    if (!c->is_greeted) {
        if (c->have < 24) return 0;
        at = 24;
        c->is_greeted = 1;
        uint32_t more = htonl(1 << 24);
        put_frame(c, 4, 0, 0, SETTINGS, sizeof SETTINGS);
        put_frame(c, 8, 0, 0, &more, 4);
    }
    while (c->have - at >= FRAME) {
        const uint8_t *head = c->in + at;
        size_t size = (size_t)head[0] << 16 | (size_t)head[1] << 8 | head[2];
        if (c->have - at < FRAME + size) break;
        uint32_t id = ((uint32_t)head[5] << 24 | (uint32_t)head[6] << 16 | (uint32_t)head[7] << 8 | head[8]) & 0x7fffffff;
        take_frame(c, head[3], head[4], id, head + FRAME, size);
        at += FRAME + size;
    }
    return at;
}

/* HTTP/1.1 */

static void put_chunk(struct connection *c, const char *data) {
    char text[1024];
    put(c, text, (size_t)sprintf(text, "%zx\r\n%s\r\n", strlen(data), data));
}

static size_t take_http1(struct connection *c) {
    size_t at = 0;
    while (at < c->have) {
        const char *begin = (const char *)c->in + at;
        const char *end = memmem(begin, c->have - at, "\r\n\r\n", 4);
        if (!end) break;
        size_t head = (size_t)(end - begin) + 4, body = 0;
        for (const char *line = begin; line < end; line = (const char *)memchr(line, '\n', (size_t)(end + 2 - line)) + 1)
            if (!strncasecmp(line, "content-length:", 15)) body = strtoul(line + 15, NULL, 10);
        if (c->have - at < head + body) break;
        if (wants_stream(end, 4 + body)) {
            static const char STREAM[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                                         "transfer-encoding: chunked\r\n\r\n";
            put(c, STREAM, sizeof STREAM - 1);
            begin_stream(c, 0, "");
        } else {
            char text[1024];
            put(c, text, (size_t)sprintf(text, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: "
                                               "%zu\r\n\r\n%s", sizeof ANSWER - 1, ANSWER));
        }
        at += head + body;
    }
    return at;
}

/* One event of every stream. */
static void tick(void) {
    for (int i = 0; i < stream_count;) {
        struct stream *stream = &streams[i];
        struct connection *c = stream->connection;
        int is_last = --stream->left <= 0;
        const char *event = is_last ? DONE : EVENT;
        if (c->replica >= 0)
            put_body(c, stream->id, "text/event-stream", event);
        else
            put_chunk(c, event);
        if (is_last) {
            if (c->replica >= 0)
                end_stream(c, stream->id, stream->request);
            else
                put(c, "0\r\n\r\n", 5);
            *stream = streams[--stream_count];
        } else
            i++;
        /* A connection that broke is noticed when it is read. */
        (void)flush(c);
    }
}

/* Connections */

static int receive(struct connection *c) {
    for (;;) {
        ssize_t n;
        if (c->have == BUFFER) return 0;
        if (c->ssl) {
            ERR_clear_error();
            int done = SSL_read(c->ssl, c->in + c->have, (int)(BUFFER - c->have));
            int error = done > 0 ? 0 : SSL_get_error(c->ssl, done);
            if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE) return 1;
            if (error) return 0;
            n = done;
        } else {
            n = read(c->fd, c->in + c->have, BUFFER - c->have);
            if (n < 0 && errno == EAGAIN) return 1;
            if (n <= 0) return 0;
        }
        c->have += (size_t)n;
        size_t taken = c->replica >= 0 ? take_http2(c) : take_http1(c);
        memmove(c->in, c->in + taken, c->have - taken);
        c->have -= taken;
    }
}

static int choose_h2(SSL *ssl, const unsigned char **out, unsigned char *size, const unsigned char *in,
                     unsigned int in_size, void *unused) {
    (void)ssl, (void)unused;
    static const unsigned char H2[] = "\x02h2";
    return SSL_select_next_proto((unsigned char **)out, size, H2, 3, in, in_size) == OPENSSL_NPN_NEGOTIATED
               ? SSL_TLSEXT_ERR_OK
               : SSL_TLSEXT_ERR_ALERT_FATAL;
}

static void open_tls(const char *certificate, const char *key, const char *authority) {
    tls = SSL_CTX_new(TLS_server_method());
    if (!tls || SSL_CTX_use_certificate_chain_file(tls, certificate) != 1 ||
        SSL_CTX_use_PrivateKey_file(tls, key, SSL_FILETYPE_PEM) != 1 ||
        SSL_CTX_load_verify_locations(tls, authority, NULL) != 1)
        die("tls");
    SSL_CTX_set_min_proto_version(tls, TLS1_3_VERSION);
    SSL_CTX_set_verify(tls, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    /* Without it a session that is taken up again is refused. */
    SSL_CTX_set_session_id_context(tls, (const unsigned char *)"worker", 6);
    SSL_CTX_set_mode(tls, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_alpn_select_cb(tls, choose_h2, NULL);
}

static void listen_on(int replica) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    struct listener *listener = malloc(sizeof *listener);
    if (!listener) die("malloc");
    listener->replica = replica;
    listener->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (listener->fd < 0 || bind(listener->fd, (struct sockaddr *)&address, size) || listen(listener->fd, 512) ||
        getsockname(listener->fd, (struct sockaddr *)&address, &size))
        die("listen");
    /* The low bit marks a listener. */
    struct epoll_event event = {EPOLLIN, {.u64 = (uint64_t)(uintptr_t)listener | 1}};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener->fd, &event);
    printf("%d ", ntohs(address.sin_port));
}

static void take_in(struct listener *listener) {
    int fd, one = 1;
    while ((fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct connection *c = calloc(1, sizeof *c);
        if (!c) die("calloc");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        c->fd = fd;
        c->replica = listener->replica;
        if (c->replica >= 0 && tls) {
            c->ssl = SSL_new(tls);
            SSL_set_fd(c->ssl, fd);
            SSL_set_accept_state(c->ssl);
        }
        struct epoll_event event = {EPOLLIN, {.ptr = c}};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
    }
}

int main(int count, char **arguments) {
    if (count != 6) return fprintf(stderr, "usage: worker CERTIFICATE KEY CA HTTP_COUNT GRPC_COUNT\n"), 2;
    signal(SIGPIPE, SIG_IGN);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (strcmp(arguments[1], "-")) open_tls(arguments[1], arguments[2], arguments[3]);
    for (int i = 0; i < atoi(arguments[4]); i++) listen_on(-1);
    for (int i = 0; i < atoi(arguments[5]); i++) listen_on(i);
    printf("\n");
    fflush(stdout);
    fcntl(1, F_SETFL, O_NONBLOCK);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    struct epoll_event event = {EPOLLIN, {.u64 = 0}}, events[256];
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer, &event);
    for (int is_ticking = 0;;) {
        if ((stream_count > 0) != is_ticking) {
            is_ticking = stream_count > 0;
            struct timespec pace = {0, is_ticking ? TICK_MS * 1000000L : 0};
            timerfd_settime(timer, 0, &(struct itimerspec){pace, pace}, NULL);
        }
        int ready = epoll_wait(epoll_fd, events, 256, -1);
        for (int i = 0; i < ready; i++) {
            uint64_t what = events[i].data.u64, ticks;
            if (!what) {
                if (read(timer, &ticks, sizeof ticks) > 0) tick();
            } else if (what & 1) {
                take_in((struct listener *)(uintptr_t)(what & ~1ull));
            } else {
                struct connection *c = events[i].data.ptr;
                if (!receive(c) || !flush(c)) close_connection(c);
            }
        }
        flush_lines();
    }
}
