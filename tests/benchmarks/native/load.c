/* A client that takes as little of a core as it can: load for the benchmarks of the edge.
 *
 *   load PORT CONNECTIONS REQUEST_BYTES RATE AMOUNT < requests
 *
 * Standard input has requests of REQUEST_BYTES each, HTTP/1.1 as it goes on the wire, which are sent in turns to
 * 127.0.0.1:PORT. RATE above 0: AMOUNT requests, one every 1/RATE seconds whether or not answers have come, and latency
 * counts from when a request was due: a server that stalls is charged for what could not be sent meanwhile. RATE 0: each
 * connection sends the next request when it has its answer, for AMOUNT seconds.
 *
 * Each connection has one answer before that counts.
 *
 * Prints one line of JSON: completed, failed, seconds, p50_us, p99_us. An answer that is not 200 is a failure; the last
 * one is shown on standard error.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { BUFFER = 1 << 16, MAX_SAMPLES = 1 << 22 };
static const double GIVE_UP_SECONDS = 20;

struct connection {
    int fd, is_busy, has_head, is_chunked, is_ok;
    size_t have, left;
    double due;
    char in[BUFFER + 1];
};

static struct connection *connections;
static int connection_count, busy_count, idle_count, *idle;
static char *requests;
static size_t request_bytes, requests_have, next_request;
static float *samples;
static long completed, failed;

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + (double)at.tv_nsec / 1e9;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void start_request(struct connection *c, double due) {
    c->is_busy = 1;
    c->has_head = 0;
    c->have = 0;
    c->due = due;
    busy_count++;
    if (write(c->fd, requests + next_request, request_bytes) != (ssize_t)request_bytes) die("write");
    next_request = (next_request + request_bytes) % requests_have;
}

static void read_head(struct connection *c, char *end) {
    c->has_head = 1;
    c->is_ok = !strncmp(c->in, "HTTP/1.1 200", 12);
    c->is_chunked = 1;
    c->left = 0;
    for (char *line = c->in; line < end; line = strstr(line, "\r\n") + 2)
        if (!strncasecmp(line, "content-length:", 15)) {
            c->is_chunked = 0;
            c->left = (size_t)(end - c->in) + 4 + strtoul(line + 15, NULL, 10);
        }
}

/* Whether the answer is whole. Of a chunked one the end is what is looked at. */
static int is_whole(struct connection *c) {
    if (!c->has_head) {
        char *end = strstr(c->in, "\r\n\r\n");
        if (!end) return 0;
        read_head(c, end);
    }
    return c->is_chunked ? c->have >= 5 && !memcmp(c->in + c->have - 5, "0\r\n\r\n", 5) : c->have >= c->left;
}

static int receive(struct connection *c) {
    if (c->has_head && c->is_chunked && c->have > BUFFER / 2) {
        memmove(c->in, c->in + c->have - 8, 8);
        c->have = 8;
    }
    ssize_t n = read(c->fd, c->in + c->have, BUFFER - c->have);
    if (n <= 0) die("the server closed a connection");
    c->have += (size_t)n;
    c->in[c->have] = 0;
    if (!is_whole(c)) return 0;
    if (!c->is_ok) {
        failed++;
        if (failed == 1) fprintf(stderr, "%s\n", c->in);
    } else if (completed < MAX_SAMPLES)
        samples[completed++] = (float)((now() - c->due) * 1e6);
    c->is_busy = 0;
    busy_count--;
    return 1;
}

static int compare(const void *one, const void *other) {
    float a = *(const float *)one, b = *(const float *)other;
    return (a > b) - (a < b);
}

static void open_connections(int epoll_fd, int port) {
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1;
    for (int i = 0; i < connection_count; i++) {
        struct connection *c = &connections[i];
        c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&address, sizeof address)) die("connect");
        setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct epoll_event event = {EPOLLIN, {.ptr = c}};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event);
        idle[idle_count++] = i;
    }
}

static void set_timer(int timer, double at) {
    struct itimerspec when = {{0, 0}, {(time_t)at, (long)(fmod(at, 1) * 1e9)}};
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL);
}

/* One answer on each connection, which is not counted. */
static void warm_up(int epoll_fd, int timer) {
    double begin = now();
    while (idle_count) start_request(&connections[idle[--idle_count]], begin);
    while (busy_count) {
        struct epoll_event events[256];
        set_timer(timer, begin + GIVE_UP_SECONDS);
        int ready = epoll_wait(epoll_fd, events, 256, -1);
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c) {
                errno = ETIMEDOUT;
                die("warm-up");
            }
            if (receive(c)) idle[idle_count++] = (int)(c - connections);
        }
    }
    completed = 0;
}

int main(int count, char **arguments) {
    if (count != 6) return fprintf(stderr, "usage: load PORT CONNECTIONS REQUEST_BYTES RATE AMOUNT\n"), 2;
    connection_count = atoi(arguments[2]);
    request_bytes = strtoul(arguments[3], NULL, 10);
    double rate = atof(arguments[4]), amount = atof(arguments[5]);
    connections = calloc((size_t)connection_count, sizeof *connections);
    idle = calloc((size_t)connection_count, sizeof *idle);
    samples = malloc(MAX_SAMPLES * sizeof *samples);
    requests = malloc(1 << 22);
    if (!connections || !idle || !samples || !requests) die("memory");
    requests_have = fread(requests, 1, 1 << 22, stdin);
    if (!request_bytes || !requests_have || requests_have % request_bytes) die("requests");
    int epoll_fd = epoll_create1(EPOLL_CLOEXEC), timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    struct epoll_event event = {EPOLLIN, {.ptr = NULL}}, events[256];
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer, &event);
    open_connections(epoll_fd, atoi(arguments[1]));
    warm_up(epoll_fd, timer);
    double begin = now(), end = rate > 0 ? begin + amount / rate : begin + amount;
    long sent = 0, total = rate > 0 ? (long)amount : 0;
    for (;;) {
        double at = now();
        if (rate > 0)
            for (; sent < total && idle_count && begin + (double)sent / rate <= at; sent++)
                start_request(&connections[idle[--idle_count]], begin + (double)sent / rate);
        else
            while (idle_count && at < end) start_request(&connections[idle[--idle_count]], now());
        int is_sent = rate > 0 ? sent == total : at >= end;
        if (is_sent && !busy_count) break;
        if (at > end + GIVE_UP_SECONDS) return fprintf(stderr, "%d requests were not answered\n", busy_count), 1;
        set_timer(timer, rate > 0 && !is_sent && idle_count ? begin + (double)sent / rate : at + 0.1);
        int ready = epoll_wait(epoll_fd, events, 256, -1);
        for (int i = 0; i < ready; i++) {
            uint64_t ticks;
            struct connection *c = events[i].data.ptr;
            if (!c) {
                if (read(timer, &ticks, sizeof ticks) < 0 && errno != EAGAIN) die("timer");
            } else if (receive(c))
                idle[idle_count++] = (int)(c - connections);
        }
    }
    double seconds = (rate > 0 ? now() : end) - begin;
    qsort(samples, (size_t)completed, sizeof *samples, compare);
    printf("{\"completed\": %ld, \"failed\": %ld, \"seconds\": %.6f, \"p50_us\": %.1f, \"p99_us\": %.1f}\n", completed,
           failed, seconds, completed ? samples[completed / 2] : 0, completed ? samples[completed * 99 / 100] : 0);
    return 0;
}
