/* The SDK on a command line. A text is one line; a reply is its result and, tab by tab, pk dn ps ds did product_id status.
 *
 *     driver send_req ACT PK DID SERVER      the returned text, or NULL
 *     driver request ACT PK DID SERVER       triple_request()
 *     driver again PK SERVER                 asks without a DeviceID, then again and reports, all with what the reply has
 *     driver parse FILE...                   parse_data() and triple_parse() of each file, a line each
 *
 * Built with hal_memory.c and -DREPLAY instead:
 *
 *     driver replay ACT PK DID PIECE FILE... triple_request(), answered with each file; then the number of connections
 *
 * Every buffer has exactly the promised size and its own block of heap, so that ASan and valgrind see one byte more. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "triple_burn.h"

#ifdef REPLAY
#include "hal_memory.h"
#endif

static char *block(size_t size)
{
    char *memory = malloc(size);

    if (memory == NULL)
        abort();
    memset(memory, '?', size);
    return memory;
}

static void print_reply(int result, const triple_reply *r)
{
    printf("%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", result, r->product_key, r->device_name, r->product_secret,
           r->device_secret, r->device_id, r->product_id, r->status);
}

/* Ask in a buffer of `size` bytes on the heap. */
static int request(int act, const char *pk, const char *did, const char *server, size_t size)
{
    triple_reply *reply = malloc(sizeof *reply);
    char *buffer = block(size);
    int result = triple_request(act, pk, did, server, buffer, size, reply);

    print_reply(result, reply);
    free(buffer);
    free(reply);
    return result;
}

static char *read_file(const char *name, size_t *length)
{
    FILE *file = fopen(name, "rb");
    char *text = block(1 << 20);

    if (file == NULL)
        abort();
    *length = fread(text, 1, (1 << 20) - 1, file);
    fclose(file);
    text[*length] = '\0';
    text = realloc(text, *length + 1);
    if (text == NULL)
        abort();
    return text;
}

#ifdef REPLAY

int main(int argc, char **argv)
{
    int i;

    for (i = 6; i < argc; i++) {
        size_t length;
        char *text = read_file(argv[i], &length);

        memory_refuse = getenv("REFUSE") != NULL ? (unsigned)atoi(getenv("REFUSE")) : 0;
        memory_break = getenv("BREAK") != NULL ? (unsigned)atoi(getenv("BREAK")) : 0;
        memory_back = getenv("BACK") != NULL ? strtoull(getenv("BACK"), NULL, 10) : 0;
        memory_clock = getenv("CLOCK") != NULL ? strtoull(getenv("CLOCK"), NULL, 10) : 0;
        memory_serve(text, length, (size_t)atoi(argv[5]), getenv("SILENT") != NULL);
        request(atoi(argv[2]), argv[3], argv[4], "127.0.0.1", TRIPLE_BUFFER_SIZE);
        printf("%u\n", memory_connections);
        free(text);
    }
    return 0;
}

#else

static int send_request(int act, char *pk, char *did, const char *server)
{
    char *text = send_req(act, pk, did, server);

    puts(text != NULL ? text : "NULL");
    HAL_Free(text);
    return text == NULL;
}

/* The reply's own texts are the next call's arguments; the last call has no buffer. */
static void ask_again(const char *pk, const char *server)
{
    triple_reply *reply = malloc(sizeof *reply);
    char *buffer = block(TRIPLE_BUFFER_SIZE);

    print_reply(triple_request(0, pk, "", server, buffer, TRIPLE_BUFFER_SIZE, reply), reply);
    print_reply(triple_request(0, pk, reply->device_id, server, buffer, TRIPLE_BUFFER_SIZE, reply), reply);
    print_reply(triple_request(1, reply->product_key, reply->device_id, server, buffer, TRIPLE_BUFFER_SIZE, reply), reply);
    print_reply(triple_request(0, pk, "MAC-0001", server, NULL, 0, reply), reply);
    free(buffer);
    free(reply);
}

static void parse(const char *name)
{
    size_t length;
    char *text = read_file(name, &length);
    char *pk = block(PRODUCT_KEY_LEN), *dn = block(DEVICE_NAME_LEN), *ps = block(PRODUCT_SECRET_LEN);
    char *ds = block(DEVICE_SECRET_LEN), *did = block(DEVICE_ID_LEN);
    triple_reply *reply = malloc(sizeof *reply);
    int result = parse_data(text, pk, dn, ps, ds, did);

    if (result == TRIPLE_OK)
        printf("%d\t%s\t%s\t%s\t%s\t%s\n", result, pk, dn, ps, ds, did);
    else
        printf("%d\t%c%c%c%c%c\n", result, pk[0], dn[0], ps[0], ds[0], did[0]);
    print_reply(triple_parse(text, length, reply), reply);
    free(text);
    free(pk);
    free(dn);
    free(ps);
    free(ds);
    free(did);
    free(reply);
}

int main(int argc, char **argv)
{
    int i;

    if (argc == 6 && strcmp(argv[1], "send_req") == 0)
        return send_request(atoi(argv[2]), argv[3], argv[4], argv[5]);
    if (argc == 6 && strcmp(argv[1], "request") == 0)
        return request(atoi(argv[2]), argv[3], argv[4], argv[5], TRIPLE_BUFFER_SIZE) != TRIPLE_OK;
    if (argc == 4 && strcmp(argv[1], "again") == 0) {
        ask_again(argv[2], argv[3]);
        return 0;
    }
    for (i = 2; i < argc; i++)
        parse(argv[i]);
    return 0;
}

#endif
